"""Paths of a run, in a directory or in a bucket such as gs://bucket/run."""

from etils import epath


def is_remote(path):
    """Whether it is in a bucket, where files are written whole and never appended to."""
    return "://" in str(path)


def absolute(path):
    """The same path from the root; `epath.Path.absolute` would take one in a bucket for a relative one."""
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()
