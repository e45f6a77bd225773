"""``python -m bench``: the command line."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import traceback

# Name -> (module with add_arguments(parser), run(options) -> int and EXAMPLES, one line of help). Imported when named.
COMMANDS = {
    "quick": ("bench.main_job", "the main job on real input: tokens, drift and time by rule"),
    "run": ("bench.suites", "a suite of checks against peers, as JSON"),
    "e2e": ("bench.e2e", "the 55 % tracker: throughput over reduction against the ideal line"),
    "list": ("bench.listing", "what can be measured here, and why the rest cannot"),
    "profile": ("bench.profile", "where an op's time goes"),
    "report": ("bench.report", "one HTML page of results files"),
    "compare": ("bench.compare", "verdicts on two result files, ours or pytest-benchmark's"),
    "gate": ("bench.gate", "measure a base and a head in turns, and judge"),
    "static": ("bench.static", "registers, spills, occupancy and tensor work against pins, without a GPU"),
    "sweep": ("bench.sweep", "launch configurations of Triton kernels on a GPU, into the tuning table"),
    "device": ("bench.device", "everything that needs a GPU"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 bad input or arguments, or nothing that can be judged."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(arguments)
        return int(options.run(options))
    except BrokenPipeError:  # a reader that had enough, as head
        sys.stderr.close()
        return 0
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench {arguments[0]}: interrupted", file=sys.stderr)
        return 2
    except Exception:  # Python would end with 1, which says that a check failed
        traceback.print_exc()
        return 2


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description="Benchmarks, run from a checkout.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        formatter = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text.replace("%", "%%"), formatter_class=formatter)
        if arguments[:1] == [name]:
            loaded = importlib.import_module(module)
            command.description, command.epilog = loaded.__doc__, loaded.EXAMPLES
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
