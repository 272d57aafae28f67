"""The command `armillary`, and `python -m armillary`: Ctrl-C ends it without a traceback from its very first imports on."""

import signal


def main() -> None:
    """Run the command line and exit with its status."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell that started it in the background has switched Ctrl-C off
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from armillary.cli.main import main as command

    signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
