"""What a user is told about the licence of the released weights, which is not that of this program."""

WEIGHTS_LICENSE = """\
These are weights of VisualGLM-6B, converted from the original checkpoint; conversion changes no rights in them.

They are not covered by the licence of the program that converted them. Their authors (THUDM) allow their use for
research only, and not for commercial purposes. The binding text is the model licence in the source repository,
https://github.com/THUDM/VisualGLM-6B. Read it before you use or pass on these files, and keep this
note with them.
"""
