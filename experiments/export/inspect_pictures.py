"""What the factory runs: python inspect_pictures.py model.onnx PICTURE...

It needs onnxruntime, pillow and numpy, and nothing of lit_defect. Pictures become bytes as in training, where
`data.on_wrong_mode convert` was set: turned upright, 16 bits divided by 257; other kinds are refused. A file
that cannot be judged is named, the others are judged, and the exit code is 1.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def as_trained(path):
    """(H, W, 3) bytes, at the camera's own size."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode not in ("L", "RGB", "1", "P") or "transparency" in picture.info:
        raise ValueError(f"mode {picture.mode}: save it as 8-bit grey or RGB")
    return np.asarray(picture.convert("RGB"))


if len(sys.argv) < 3:
    sys.exit("usage: python inspect_pictures.py model.onnx PICTURE...")
session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
unread = 0
for path in sys.argv[2:]:
    try:
        said = dict(zip(about["outputs"], session.run(None, {"pictures": as_trained(path)[None]}), strict=True))
        short = {name: value[0].tolist() for name, value in said.items() if value.ndim < 3}  # maps are NumPy arrays
        print(path, about["class_names"], about.get("threshold"), json.dumps(short))
    except (OSError, ValueError) as problem:
        print(f"{path} is not judged: {problem}", file=sys.stderr)
        unread = 1
sys.exit(unread)
