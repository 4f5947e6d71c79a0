"""What the factory runs: python inspect_pictures.py model.onnx PICTURE...

It needs onnxruntime, pillow and numpy, and nothing of lit_defect.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
for path in sys.argv[2:]:
    pixels = np.asarray(Image.open(path).convert("RGB"))  # (H, W, 3) bytes, at the camera's own size
    said = dict(zip(about["outputs"], session.run(None, {"pictures": pixels[None]}), strict=True))
    short = {name: value[0].tolist() for name, value in said.items() if value.ndim < 3}  # maps are NumPy arrays
    print(path, about["class_names"], about.get("threshold"), json.dumps(short))
