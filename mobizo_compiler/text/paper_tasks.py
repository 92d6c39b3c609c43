r"""The tasks of the paper (MobiZO, Gao et al. 2025, arXiv 2409.15520), as a table.

Prompts of SST-2, RTE, BoolQ, WSC, WiC, MultiRC, COPA and SQuAD are those of MeZO (Malladi et al. 2023, arXiv
2305.17333, appendix); those of MRPC, QQP, QNLI, WNLI, WinoGrande and ARC, and all learning rates, those of the code
that is published with the paper. What differs from it is in docs/tasks.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mobizo_compiler.errors import ConfigError
from mobizo_compiler.text.tasks import Task

# What the paper trains with on a server, whatever the task. Batch times queries is 16.
LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BATCH_TIMES_QUERIES, QUERIES, MOST_TOKENS = 16, 4, 512
TRAINING: Mapping[str, Any] = {"steps": 20_000, "schedule": "constant", "validate_every": 500, "validation_rows": 1000}
ROWS = 1000  # of a split: the first ones
ANSWER_TOKENS = 50  # that are generated for a question at most

_ENTAILED = {"entailment": "Yes", "not_entailment": "No"}
_TRUE = {"False": "No", "True": "Yes"}
_ARC: dict[str, Any] = {
    "template": "Pick the most correct option to answer the following question.\n"
    "{question}\nOptions:\n{listed}\nAnswer:",
    "label": "answerKey",
    "options": "choices.label",
    "labels": "choices.label",
    "made": {
        "listed": "{% for text in choices.text %}- {{ choices.label[loop.index0] }}: {{ text }}"
        "{{ '' if loop.last else '\n' }}{% endfor %}"
    },
}
_CONTINUED = (
    "{0} if {0}.startswith(('I ', \"I'\")) else {0}[0] | lower ~ {0}[1:]"  # of a sentence that begins with a capital
)


def _rates(one: float, four: float | None = None, sixteen: float | None = None) -> dict[int, float]:
    return {1: one, 4: four or one, 16: sixteen or one}


_ALL = (
    Task(
        "sst2",
        "SST-2",
        "glue, sst2",
        "{sentence} It was",
        words={"negative": "terrible", "positive": "great"},
        learning_rates=_rates(5e-5),
    ),
    Task(
        "rte",
        "RTE",
        "super_glue, rte",
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        words=_ENTAILED,
        other_names={"sentence1": "premise", "sentence2": "hypothesis"},
        learning_rates=_rates(5e-5),
    ),
    Task(
        "mrpc",
        "MRPC",
        "glue, mrpc",
        "Do the following two sentences mean the same thing? Yes or No?\n"
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n",
        words={"not_equivalent": "No", "equivalent": "Yes"},
        metric="f1",
        learning_rates=_rates(5e-5),
    ),
    Task(
        "qqp",
        "QQP",
        "glue, qqp",
        "Are these two questions asking the same thing? Yes or No?\nQuestion 1: {question1}\nQuestion 2: {question2}\n",
        words={"not_duplicate": "No", "duplicate": "Yes"},
        metric="f1",
        learning_rates=_rates(5e-5),
    ),
    Task(
        "qnli",
        "QNLI",
        "glue, qnli",
        "Does this sentence answer the question? Yes or No?\nQuestion: {question}\nSentence: {sentence}\n",
        words=_ENTAILED,
        learning_rates=_rates(5e-5),
    ),
    Task(
        "wnli",
        "WNLI",
        "glue, wnli",
        "Given the first sentence, is the second sentence true? Yes or No?\n"
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n",
        words={"not_entailment": "No", "entailment": "Yes"},
        learning_rates=_rates(1e-4),
    ),
    Task(
        "boolq",
        "BoolQ",
        "super_glue, boolq",
        "{passage} {question}",
        words=_TRUE,
        made={"question": "{{ question[0] | upper }}{{ question[1:].rstrip('?') }}?"},
        other_names={"answer": "label"},
        learning_rates=_rates(1e-4),
    ),
    Task(
        "wsc",
        "WSC",
        "super_glue, wsc.fixed",
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {span1_text}? Yes or No?\n',
        words=_TRUE,
        made={"pronoun": "{{ span2_text | lower }}"},
        learning_rates=_rates(5e-4, 5e-4, 1e-4),
    ),
    Task(
        "wic",
        "WiC",
        "super_glue, wic",
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        words=_TRUE,
        learning_rates=_rates(5e-5, 5e-5, 1e-4),
    ),
    Task(
        "multirc",
        "MultiRC",
        "super_glue, multirc",
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        words=_TRUE,
        metric="f1",
        learning_rates=_rates(5e-5),
    ),
    Task(
        "copa",
        "COPA",
        "super_glue, copa",
        "{premise} {because}",
        options=f"[{_CONTINUED.format('choice1')}, {_CONTINUED.format('choice2')}]",
        labels="['0', '1']",
        made={
            "premise": "{{ premise.rstrip('.') }}",
            "because": "{{ {'cause': 'because', 'effect': 'so'}[question] }}",
        },
        max_labels=32,
        learning_rates=_rates(5e-4, 1e-4, 5e-4),
    ),
    Task(
        "winogrande",
        "WinoGrande",
        "winogrande, winogrande_m",
        "{before}",
        label="answer",
        options="[option1 ~ sentence.split('_', 1)[1], option2 ~ sentence.split('_', 1)[1]]",
        labels="['1', '2']",
        made={"before": "{{ sentence.split('_', 1)[0].rstrip() }}"},
        max_labels=64,
        learning_rates=_rates(1e-4),
    ),
    Task("arc-easy", "ARC-Easy", "allenai/ai2_arc, ARC-Easy", **_ARC, learning_rates=_rates(1e-4)),
    Task(
        "arc-challenge",
        "ARC-Challenge",
        "allenai/ai2_arc, ARC-Challenge",
        **_ARC,
        learning_rates=_rates(5e-5, 6e-5, 6e-5),
    ),
    Task(
        "squad",
        "SQuAD",
        "squad",
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        references="answers.text",
        metric="squad",
        max_labels=64,
        learning_rates=_rates(1e-4),
    ),
)
PAPER_TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """A task of the paper by its name.

    Raises:
        ConfigError: There is none of that name.

    >>> get_task("rte").title
    'RTE'
    """
    if name in PAPER_TASKS:
        return PAPER_TASKS[name]
    near = difflib.get_close_matches(name.lower(), PAPER_TASKS, 1)
    raise ConfigError(
        f"there is no task {name!r}",
        hint=(f"did you mean {near[0]!r}? " if near else "") + f"there are {', '.join(PAPER_TASKS)}",
    )
