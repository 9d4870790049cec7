"""The process by which those of a run meet: `python -m visualglm.training.mindspore.scheduler`; ends with the first."""

import os

from mindspore import communication

from visualglm.training.launch import die_with

if __name__ == "__main__":
    die_with(os.getppid())
    communication.init()
