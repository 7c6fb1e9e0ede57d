"""Copies a large file by reference where the file system can share blocks between files, else byte by byte.

Promises: the copy is independent; writing into one never changes the other (unlike a hard link); holes stay holes where
the system says where they are.
Source: Linux ioctl FICLONE (btrfs, XFS, bcachefs), copy_file_range, SEEK_HOLE.
"""

import errno
import os
import shutil
from pathlib import Path


# _IOW(0x94, 9, int) from linux/fs.h
FICLONE = 0x40049409


def copy_by_reference(source: Path, target: Path) -> bool:
    """Copies `source` to the new file `target`.

    Args:
        source (`Path`): an existing file; a symbolic link is followed.
        target (`Path`): a path that does not exist.

    Returns:
        `bool`: whether the two share their blocks.
    """
    try:
        import fcntl  # not on Windows

        with open(source, "rb") as reader, open(target, "xb") as writer:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        return True
    except (ImportError, OSError):  # other file system, other disk or other operating system
        target.unlink(missing_ok=True)
    try:
        _copy_data(source, target)
    except (AttributeError, OSError) as error:  # other operating system, or two file systems
        target.unlink(missing_ok=True)
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        shutil.copyfile(source, target)
    return False


def _copy_data(source: Path, target: Path) -> None:
    """Copies what is between the holes of a file."""
    with open(source, "rb") as reader, open(target, "xb") as writer:
        size, at = os.fstat(reader.fileno()).st_size, 0
        writer.truncate(size)
        while at < size:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                raise
            end = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.copy_file_range(reader.fileno(), writer.fileno(), end - at, at, at)
