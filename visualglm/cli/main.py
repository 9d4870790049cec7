"""The program `visualglm`: no more than it takes to look after Ctrl-C, which may come while the rest is imported."""

import sys

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
STOPPED = {EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}


def main() -> None:
    """Exits with 0; 1: what a user can mend; 2: wrong usage; 70: a fault in the program; 130: Ctrl-C; 143: SIGTERM."""
    code: int | str | None
    try:
        from visualglm.cli.program import end_in_order_on_sigterm, end_whatever_comes, run

        end_in_order_on_sigterm()
        code = run(sys.argv[1:])
        end_whatever_comes()
    except KeyboardInterrupt:
        code = _stopped(EXIT_INTERRUPTED)
    except SystemExit:
        code = _stopped(EXIT_TERMINATED)
    sys.exit(code)


def _stopped(code: int) -> int:
    if sys.stderr is not None:
        sys.stderr.write(f"visualglm: {STOPPED[code]}\n")
    return code
