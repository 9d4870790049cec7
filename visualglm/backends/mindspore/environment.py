"""What has to be so before MindSpore is imported: it is there, numpy is old enough for it, and it keeps quiet."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec

from visualglm.errors import DeviceError
from visualglm.export_cache import cache_folder

_LOG_LEVEL = "GLOG_v"
_ERRORS_ONLY = "3"
_DUMPS = "MS_OM_PATH"


def prepare_mindspore(what: str = "The mindspore backend") -> None:
    """Raises `DeviceError`, which says that `what` needs it, if MindSpore cannot be imported here.

    Its warnings, which are about what users cannot change, are left out unless GLOG_v asks for them. What it writes
    about a graph that cannot be compiled goes to our cache, unless MS_OM_PATH names a place, and not to the folder that
    the user is in.
    """
    if find_spec("mindspore") is None:
        raise DeviceError(
            f"{what} needs MindSpore 2.10, which is not installed; run "
            "`pip install 'visualglm[mindspore]'` in an environment of its own, since it needs numpy below 2."
        )
    found = version("numpy")
    if int(found.partition(".")[0]) >= 2:
        raise DeviceError(
            f"MindSpore works with numpy below 2 and numpy {found} is installed; run `pip install 'numpy<2'`, or "
            "`pip install 'visualglm[mindspore]'` in an environment of its own."
        )
    os.environ.setdefault(_LOG_LEVEL, _ERRORS_ONLY)
    os.environ.setdefault(_DUMPS, str(cache_folder()))
