"""A root of the process's own: the standard library, the C library, one folder, and nothing else.

Landlock decides what can be opened, not what can be looked at: without this, a program can ask whether a file
exists and how large it is. It takes a mount namespace, which root may make, and others where the kernel lets
them make user namespaces (most distributions do; some containers and hardened systems do not).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000
_NO_SUID, _NO_DEV, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18


def enter(folder: str, readable: Iterable[str]) -> None:
    """Make a tree of `readable` and `folder`, each at its own path, the root of the calling process.

    Args:
        folder: where the process may write; the tree hides its parent.
        readable: folders and files; what does not exist is left out.

    Raises:
        OSError: the kernel does not allow it. The process must end then: it may be half in.
    """
    users, groups = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USERS | _NEW_MOUNTS) == 0:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{users} {users} 1"),
            ("gid_map", f"{groups} {groups} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    elif _LIBC.unshare(_NEW_MOUNTS) < 0:
        raise OSError(ctypes.get_errno(), "no namespace of its own")
    root = os.path.dirname(folder)
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)  # of this namespace
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEV, "size=64k,mode=755")
    for path in readable:
        if os.path.exists(path) and not os.path.exists(root + path):
            _bind(path, root + path)
    os.makedirs(root + folder)
    _mount(f"/proc/self/fd/{handle}", root + folder, None, _BIND | _RECURSIVE)
    os.close(handle)
    os.chroot(root)
    os.chdir(folder)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(source, target, None, _BIND | _RECURSIVE)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    arguments = (os.fsencode(text) if text else None for text in (source, target, kind))
    if _LIBC.mount(*arguments, ctypes.c_ulong(flags), options.encode() if options else None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} at {target}: {os.strerror(number)}")
