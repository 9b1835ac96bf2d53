"""`mgsr` and `python -m mgsr_jax`."""

import sys


def main() -> None:
    """Run the command line; a missing extra is one line."""
    try:
        from mgsr_jax.commands import parser
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mgsr_jax"):
            raise
        print(
            f"mgsr: error: no module named {error.name!r}; the command line needs the "
            "train extra: pip install 'mgsr_jax[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(parser.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
