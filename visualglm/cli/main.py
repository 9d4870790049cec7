"""The program `visualglm`: no more than it takes to look after Ctrl-C, which may come while the rest is imported."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Exits with 0; 1: an error the user can mend; 2: wrong usage; 130: Ctrl-C; 70: a fault in the program."""
    try:
        from visualglm.cli.program import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        if sys.stderr is not None:
            sys.stderr.write("visualglm: interrupted\n")
    sys.exit(code)
