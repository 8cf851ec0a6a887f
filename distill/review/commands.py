"""`python -m distill review|export|import QUEUE`: people's decisions on a file of answers, made, taken out, brought in.

They are kept beside the queue, in QUEUE.decisions.jsonl. Exit codes: 0 done, 2 bad input.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from distill.review.decisions import Decisions, Review, check_name
from distill.review.exchange import LABELING, from_tool, to_argilla, to_label_studio, to_sft
from distill.review.log import Log, read_log
from distill.review.queue import load_queue
from runtime.errors import UserError
from runtime.files import make_folder, write_durably
from runtime.progress import visible

PORT = 8765


def review(arguments: list[str]) -> int:
    """Serve the page until Ctrl-C."""
    parser = _parser("review", "Judge answers on a local web page: accept, edit or reject each with the keyboard.")
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any that is free; default {PORT}")
    parser.add_argument(
        "--reviewer", action="append", default=[], help="a name the page takes, once or more; default: any"
    )
    args = parser.parse_args(arguments)
    reviewers = [check_name(name) for name in args.reviewer]
    try:
        from distill.review.server import serve
    except ImportError as error:
        raise UserError(f"the page needs FastAPI and uvicorn ({error}): pip install -e '.[review]'") from error
    queue = load_queue(args.queue)
    with Log(queue.log_path) as log:
        reviewed = Review(queue, log)

        def announce(address: str) -> None:
            print(f"{queue.summary()}; decisions go to {queue.log_path}")
            if reviewed.decisions.stale:
                print(f"{reviewed.decisions.stale:,} earlier decisions were about other texts and don't count")
            port = address.split(":")[2].split("/")[0]
            print(f"open      {address}")
            print(
                f"elsewhere ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, then the same address; Ctrl-C ends it",
                flush=True,
            )

        serve(reviewed, port=args.port, reviewers=reviewers, announce=announce)
        print(f"\n{_counted(reviewed.decisions)}")
    return 0


def export(arguments: list[str]) -> int:
    """Write the queue with its decisions in another form."""
    parser = _parser("export", "Write answers and decisions for another program.")
    parser.add_argument(
        "--to", choices=("argilla", "label_studio", "sft"), required=True, help="sft: JSON lines to train on"
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="what to write")
    args = parser.parse_args(arguments)
    queue = load_queue(args.queue)
    decisions = Decisions(queue, read_log(queue.log_path))
    make_folder(args.file.absolute().parent)
    if args.to == "sft":
        rows = list(to_sft(decisions))
        write_durably(args.file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
        print(f"{len(rows):,} rows in {args.file}; {_counted(decisions)}")
        return 0
    records = to_argilla(decisions) if args.to == "argilla" else to_label_studio(decisions)
    write_durably(args.file, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(records):,} records in {args.file}; {_counted(decisions)}")
    if args.to == "label_studio":
        interface = args.file.with_name(f"{args.file.name}.interface.xml")
        write_durably(interface, LABELING)
        print(f"labeling interface in {interface}")
    return 0


def import_(arguments: list[str]) -> int:
    """Add to the log what people decided in another program; what was imported before is not added again."""
    parser = _parser("import", "Bring in decisions that were made in another program.")
    parser.add_argument("--from", dest="tool", choices=("argilla", "label_studio"), required=True)
    parser.add_argument("file", metavar="FILE", type=Path, help="its JSON export")
    parser.add_argument(
        "--name", action="append", default=[], metavar="ID=REVIEWER", help="whom the program's user id stands for"
    )
    args = parser.parse_args(arguments)
    names = dict(_named(pair) for pair in args.name)
    queue = load_queue(args.queue)
    try:
        found = json.loads(args.file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(args.file)!r}: can't be read as JSON: {error}") from error
    if not isinstance(found, list):
        raise UserError(f"{str(args.file)!r}: holds a {type(found).__name__}, not a list of records; export it as JSON")
    made, aside = from_tool(args.tool, found, queue, names)
    outcomes = Counter(f"set aside: {reason}" for _, reason in aside)
    with Log(queue.log_path) as log:
        reviewed = Review(queue, log)
        for foreign in made:
            content = json.dumps(
                [args.tool, foreign.item.id, foreign.item.digest, foreign.reviewer, foreign.action, foreign.text]
            )
            key = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
            stands = reviewed.decisions.of(foreign.item).get(foreign.reviewer)
            same = stands is not None and (stands.action, stands.text) == (foreign.action, foreign.text)
            if same or key in reviewed.decisions.keys:
                outcomes["there already"] += 1
                continue
            try:
                reviewed.decide(
                    foreign.item,
                    foreign.action,
                    reviewer=foreign.reviewer,
                    text=foreign.text,
                    key=key,
                    source=args.tool,
                )
                outcomes["added"] += 1
            except UserError as error:
                outcomes[f"set aside: {str(error).partition(':')[0]} of no use"] += 1
        print("\n".join(f"{count:,} {visible(outcome)}" for outcome, count in outcomes.items()) or "no decisions")
        print(_counted(reviewed.decisions))
    return 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m distill {command}", description=description)
    parser.add_argument(
        "queue",
        metavar="QUEUE",
        help="a distillation run's folder, or JSON lines or Parquet with id, messages and domain",
    )
    return parser


def _counted(decisions: Decisions) -> str:
    return "{settled:,} of {total:,} rows settled, {disputed:,} disputed".format(**decisions.progress())


def _named(pair: str) -> tuple[str, str]:
    user, equals, name = pair.partition("=")
    if not equals:
        raise UserError(f"--name {pair!r}: give the program's user id, =, and the reviewer's name")
    return user, check_name(name)
