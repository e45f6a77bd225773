"""``python -m model``: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys

# Name -> (module with add_arguments(parser), run(options) -> int and EXAMPLES, one line of help). Imported when named.
COMMANDS = {
    "verify": ("model.verify", "the model against numbers from the released code"),
    "generate": ("model.generate", "answer a prompt about images, volumes and videos"),
    "tiny": ("model.tiny", "write a small random checkpoint, to try everything without weights"),
    "describe": ("model.describe", "what the processor makes of a file, and what each pruning rule keeps"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 bad input or arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m model", description="The reference Hulu-Med.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if arguments[:1] == [name]:
            loaded = importlib.import_module(module)
            command.description, command.epilog = loaded.__doc__, loaded.EXAMPLES
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print(f"{options.command}: interrupted", file=sys.stderr)
        return 2
    except BrokenPipeError:  # a reader that had enough, as head
        sys.stderr.close()
        return 0
    except Exception as error:
        from hulukern import BackendUnavailable  # here, since it loads torch, which --help does not need

        if not isinstance(error, (ValueError, OSError, BackendUnavailable)):
            raise
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
