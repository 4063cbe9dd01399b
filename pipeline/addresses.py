"""Addresses of media: roots, uris below them, members of tars. Opens nothing.

A root is an absolute folder or a URL. A uri is a path below a root. Rows of tables and members of
tars name uris, and whoever wrote them is not trusted.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from pipeline.settings import ConfigError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# `00000.tar#1536+20480/clip.mp4` is 20480 bytes of 00000.tar from byte 1536 on.
MEMBER = re.compile(
    r"(?P<tar>.+?\.tar)#(?P<offset>\d{1,18})\+(?P<size>\d{1,18})/.+", re.IGNORECASE | re.DOTALL
)
# A name and a password before an @; a port is none. AWS secrets may hold slashes.
PASSWORD = re.compile(r"[^/@]*:(?!\d+(/|$))[^@]*@")


class UriError(ValueError):
    """A uri that could lead out of its root."""


def normal_root(address: str) -> str:
    """Return an absolute path, or a URL without a slash at its end.

    Raises:
        ConfigError: the URL holds a password or a query, which would be written into the plan.
    """
    if not URL.match(address):
        return os.path.abspath(address)  # noqa: PTH100 (links stay)
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if PASSWORD.match(rest):
        host = re.split("[/?#]", rest.rpartition("@")[2])[0]
        raise ConfigError(
            f"a URL of {scheme}://…@{host} holds a password, which would be written into the plan; "
            "take it out and give it by the environment (AWS_ACCESS_KEY_ID, FSSPEC_S3_KEY, …) or "
            "in ~/.config/fsspec/*.json"
        )
    plain = re.split("[?#]|::", re.sub(r"^\[[0-9A-Fa-f:]*\]", "", rest))
    if len(plain) > 1:
        raise ConfigError(
            f"a URL below {scheme}://{re.split('[?#]', rest)[0]} goes on after `?`, `#` or `::`; "
            "that may be a secret, and would be written into the plan: leave it out"
        )
    if scheme in ("file", "local"):
        return normal_root("/" + unquote(rest.partition("/")[2]))
    return f"{scheme}://{rest.rstrip('/')}"


def parent_and_name(address: str) -> tuple[str, str]:
    """Split the address of a file into its folder's and its name."""
    folder, _, name = normal_root(address).rpartition("/")
    return folder or "/", unquote(name) if folder.startswith("http") else name


def check_uri(uri: str, strict: bool = True) -> str:
    """Return ``uri`` if it can only mean a file below its root.

    Args:
        uri: as a row or a tar names it.
        strict: refuse what is harmless on Linux only, too: backslashes, drives, control characters.

    Raises:
        UriError: and why.
    """
    parts = uri.split("/")
    if not uri or "\0" in uri:
        raise UriError(f"{uri!r} is no path")
    if uri.startswith("/") or URL.match(uri):
        raise UriError(f"{uri!r} is not below the folder of the media")
    if ".." in parts or "." in parts or "" in parts:
        raise UriError(f"{uri!r} has a part that is '..', '.' or empty")
    if strict and (re.match("[A-Za-z]:", uri) or re.search(r"[\\\x00-\x1f\x7f]", uri)):
        raise UriError(f"{uri!r} has a drive letter, a backslash or a control character")
    return uri


def uri_below(root: str, address: str) -> str:
    """Return the uri of what a row names: a uri, or a path or URL below the root.

    Raises:
        UriError: it is not below the root, or could lead out of it.
    """
    if not URL.match(address) and not address.startswith("/"):
        return check_uri(address)
    try:
        path = normal_root(address) if URL.match(address) else address
    except ConfigError as error:
        raise UriError(str(error)) from None
    folder = root.rstrip("/") + "/"
    if ".." in address.split("/") or not path.startswith(folder):
        raise UriError(f"{address!r} is not below {root}, the folder of the media")
    uri = path[len(folder) :]
    return check_uri(unquote(uri) if root.startswith("http") else uri)


def is_hidden(uri: str) -> bool:
    """Return whether a part of a path starts with a dot."""
    return any(part.startswith(".") for part in uri.split("/"))


def file_of(uri: str) -> str:
    """Return the file that holds what a uri names: itself, or the tar of a member."""
    member = MEMBER.fullmatch(uri)
    return member["tar"] if member else uri
