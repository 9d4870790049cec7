"""The program `visualglm`: no more than it takes to look after Ctrl-C, which may come while the rest is imported."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Exits with 0; 1: what a user can mend; 2: wrong usage; 70: a fault in the program; 130: Ctrl-C; 143: SIGTERM."""
    try:
        from visualglm.cli.program import end_in_order_on_sigterm, run

        end_in_order_on_sigterm()
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        if sys.stderr is not None:
            sys.stderr.write("visualglm: interrupted\n")
    sys.exit(code)
