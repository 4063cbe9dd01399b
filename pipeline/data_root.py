"""The root of a data set: a local folder, or a URL of anything fsspec knows.

Either way it is used like a ``pathlib.Path``; see ``pipeline.files`` for what object stores add.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from upath import UPath

from pipeline.folders import URL, normal_root
from pipeline.settings import ConfigError
from pipeline.storage import scrubbed


def open_root(address: str) -> Path:
    """Return the root of a data set: an absolute path, or a ``UPath`` which is used like one.

    Args:
        address: a folder or a URL, without credentials.

    Raises:
        ConfigError: the URL holds a password or a query, see ``pipeline.folders.normal_root``; no
            package is installed for such URLs, or no server answers.
    """
    root = normal_root(address)
    if not URL.match(root):
        return Path(root)
    try:
        path = UPath(root, use_listings_cache=False)
        path.fs  # noqa: B018 (connects)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{root} can't be opened: {scrubbed(error)}. For s3:// install the extra: "
            "pip install 'av-latents[s3]'; for others the package that fsspec names"
        ) from None
    except Exception as error:  # some connect at once, with exceptions of their own
        raise ConfigError(
            f"{root} can't be opened: {scrubbed(error)}; expected a server that answers: is the "
            "address right, and the network up?"
        ) from None
    return cast(Path, path)
