"""`python -m moonshot` is the command line, as `moonshot` is."""

import sys

from moonshot.extras import from_extra


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        with from_extra("cli"):
            import rich  # noqa: F401
            import typer  # noqa: F401
    except ImportError as error:
        print(f"moonshot: {error}", file=sys.stderr)
        sys.exit(1)
    from moonshot.app import cli

    cli.main()


if __name__ == "__main__":
    main()
