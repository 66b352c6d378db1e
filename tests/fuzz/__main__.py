"""python -m fuzz: for so many seconds, then a table and one line of JSON. Exit code 1 if a case broke the rule."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fuzz import bed


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--kinds", default=",".join(bed.KINDS), help=f"separated by commas (default: {','.join(bed.KINDS)})")
    parser.add_argument("--seconds", type=float, default=600.0, help="of all kinds together (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this case of the kind, in this process")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON document there")
    parser.add_argument("--serve", metavar="KIND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.serve:
        bed.serve(options.serve, options.seed)
        return 0
    if options.case is not None:
        with tempfile.TemporaryDirectory(prefix="fastfill-fuzz-") as place:
            outcome = bed.judge(kinds[0], options.case, options.seed, bed.world_of(kinds[0], Path(place)))
        print(f"{outcome.verdict}: {outcome.what!r}\n{outcome.words}")
        return outcome.verdict in bed.FAULTS

    from fastfill import files, machine
    from fastfill.errors import printable

    rows, faults = [], []
    for kind in kinds:
        found = list(bed.outcomes(kind, options.seed, bed.for_seconds(options.seconds / len(kinds))))
        bad = [outcome for outcome in found if outcome.verdict in bed.FAULTS]
        rows.append({"kind": kind, "cases": len(found), "faults": len(bad), "verdicts": bed.count(found)})
        faults += bad
    for fault in faults:
        what, words = printable(fault.what, 200), printable(_last(fault.words), 300)
        print(f"{fault.kind} --seed {options.seed} --case {fault.case}: {fault.verdict} ({what})\n    {words}")
    print(f"{'kind':14}{'cases':>8}{'faults':>8}  verdicts")
    for row in rows:
        print(f"{row['kind']:14}{row['cases']:8}{row['faults']:8}  {', '.join(f'{n} {v}' for v, n in row['verdicts'].items())}")
    document = {"task": "fuzz", "seed": options.seed, "seconds": options.seconds, "rows": rows, "machine": machine.describe()}
    if options.out:
        files.write(options.out, json.dumps(document) + "\n")
    print(json.dumps(document))
    return bool(faults)


def _last(words: str) -> str:
    """Of a traceback its last line."""
    return next((line for line in reversed(words.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
