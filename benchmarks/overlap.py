"""How much of evaluation texts stands in training text: runs of 13 words that both have.

    python benchmarks/overlap.py file:train.jsonl wikitext2:wikitext2.test.raw c4:c4.eval.jsonl

Sources as in ``prepare_text.py``, the training text first. A line of JSON for every other one.
Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

from prepare_text import documents

RUN = 13  # words


def runs(name: str) -> Iterator[tuple[str, ...]]:
    """Every run of words in the documents of a source; none crosses two documents."""
    for document in documents([name]):
        words = re.findall(r"\w+", document.lower())
        yield from (tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def main() -> None:
    """Counts the runs of each text, and those that the training text has."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    known = {hash(run) for run in runs(sys.argv[1])}
    for name in sys.argv[2:]:
        own = [hash(run) in known for run in runs(name)]
        found = {"text": name, "runs": len(own), "in_training_text": sum(own)}
        print(json.dumps({"training_text": sys.argv[1], "words": RUN, **found}))


if __name__ == "__main__":
    main()
