"""Whether Weights & Biases knows the user on this machine; asked without importing wandb or torch."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from pathlib import Path

_CLOUD = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's own: `wandb login` stores the key under either name


def server() -> str:
    """Address of the W&B server: the environment's, that of `wandb login --host`, or W&B's own."""
    settings = configparser.ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        settings.read(folder.expanduser() / "settings", encoding="utf-8")
    told = settings.get("default", "base_url", fallback=None)
    return os.environ.get("WANDB_BASE_URL") or told or f"https://{_CLOUD[0]}"


def logged_in() -> bool:
    """Whether an API key is at hand, without asking anybody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = server().split("//")[-1].split("/")[0]
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            known = netrc.netrc(os.path.expanduser(path)) if path else None
        except (OSError, netrc.NetrcParseError):
            continue
        if known and any(known.authenticators(name) for name in (_CLOUD if host in _CLOUD else (host,))):
            return True
    return False
