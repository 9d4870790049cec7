"""`python -m visualglm.cli` is `visualglm`."""

from visualglm.cli.main import main

if __name__ == "__main__":
    main()
