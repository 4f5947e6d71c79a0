"""`python -m lit_defect VERB`: a verb that needs no PyTorch starts at once; the others are LightningCLI's."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import textwrap

import lit_defect
from lit_defect.stopping import SIGNALS, STOP
from lit_defect.verbs import OWN_VERBS, VERBS


def main() -> None:
    """Run the verb of the command line.

    Raises:
        SystemExit: the verb's exit status; 2 for what the user can mend.
    """
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in OWN_VERBS:
        module, _ = OWN_VERBS[verb]
        raise SystemExit(importlib.import_module(module).main(sys.argv[2:]))
    if verb in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if verb else sys.stderr)
        raise SystemExit(0 if verb else 2)
    if not verb.startswith("-") and verb not in VERBS:
        known = [*VERBS, *OWN_VERBS]
        near = difflib.get_close_matches(verb, known, 1)
        hint = f": did you mean {near[0]}?" if near else f"; the verbs are {', '.join(known)}"
        print(f"error: unknown verb {verb!r}{hint}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with STOP.heeded():  # while PyTorch is read, too
            from lit_defect.cli import main as run

            run()
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # all is done, and Python's own end takes seconds


def usage() -> str:
    """All verbs with what they do."""
    verbs = VERBS | {verb: text for verb, (_, text) in OWN_VERBS.items()}
    lines = ["usage: python -m lit_defect VERB [--config FILE] [OPTIONS]", "", (lit_defect.__doc__ or "").strip(), ""]
    for name, text in verbs.items():
        lines += textwrap.wrap(text, 110, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    lines += ["", "python -m lit_defect VERB --help lists the options of a verb."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
