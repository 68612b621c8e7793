"""One row of every named set as its hub copy has it, written by hand from the data set cards, and
what has to come of it.

``Expected.shows``: texts that every prompt has to hold. ``hidden``: the answer must not stand in
the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expected:
    row: dict[str, Any]
    answer: str
    shows: tuple[str, ...]
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    hidden: bool = True


def choice(row: dict[str, Any], options: tuple[str, ...], right: int, *shows: str) -> Expected:
    return Expected(row, options[right], shows, (options[right],), options, (right,), hidden=False)


FOUR = ("a sieve", "a magnet", "a candle", "a ruler")
ARC = {
    "id": "Mercury_1", "question": "Which tool separates iron filings from sand?",
    "choices": {"text": list(FOUR), "label": ["A", "B", "C", "D"]}, "answerKey": "B",
}  # fmt: skip
ANLI = {
    "uid": "x",
    "premise": "Ann Lee was born in Cork in 1901.",
    "hypothesis": "Ann Lee was born in Ireland.",
    "label": 0,
    "reason": "",
}
SQUAD = {
    "id": "x",
    "title": "Lake",
    "context": "The lake froze in 1947. Ferries stopped.",
    "question": "When did the lake freeze?",
    "answers": {"text": ["1947", "in 1947"], "answer_start": [18, 15]},
}
TRUTH = {
    "type": "Adversarial",
    "category": "Myths",
    "question": "Can bats see?",
    "best_answer": "Yes, bats can see",
    "correct_answers": ["Yes", "Yes, bats can see"],
    "incorrect_answers": ["No, bats are blind", "Only at night"],
    "source": "",
}
MC = {
    "question": "Can bats see?",
    "mc1_targets": {"choices": ["Yes, bats can see", "No"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["Yes, bats can see", "Yes", "No"], "labels": [1, 1, 0]},
}
LONG = {
    "input": "Who led the talks?",
    "context": "A long record of the talks. Mara led them.",
    "answers": ["Mara", "Mara Quell"],
    "length": 9,
    "dataset": "x",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
CLASSED = LONG | {
    "input": "Question: Who won?\nType:",
    "answers": ["Individual"],
    "all_classes": ["Food", "Individual", "Date"],
}

ROWS: dict[str, Expected] = {
    "common_gen": Expected(
        {
            "concept_set_idx": 0,
            "concepts": ["ski", "mountain", "skier"],
            "target": "Skier skis down the mountain",
        },
        "Skier skis down the mountain",
        ("ski, mountain, skier",),
        ("Skier skis down the mountain",),
    ),
    "xsum": Expected(
        {"document": "Rain fell. Roads shut.", "summary": "A storm closed roads.", "id": "1"},
        "A storm closed roads.",
        ("Rain fell. Roads shut.",),
    ),
    "samsum": Expected(
        {"id": "1", "dialogue": "A: Lunch?\r\nB: At one.", "summary": "A and B have lunch at one."},
        "A and B have lunch at one.",
        ("A: Lunch?\r\nB: At one.",),
    ),
    "scitldr": Expected(
        {
            "source": ["We study X.", "It works."],
            "source_labels": [0, 1],
            "rouge_scores": [0.1, 0.2],
            "paper_id": "p",
            "target": ["X works well.", "A study of X."],
        },
        "X works well.",
        ("We study X. It works.",),
        ("X works well.", "A study of X."),
    ),
    "eng_spa": Expected(
        {"eng": "Good day.", "spa": "Buenos días."}, "Buenos días.", ("Good day.",)
    ),
    "python_code": Expected(
        {
            "instruction": "Add two numbers.",
            "input": "Not applicable",
            "output": "print(1 + 2)",
            "prompt": "Below is ...",
        },
        "print(1 + 2)",
        ("Add two numbers.",),
    ),
    "bool_q": choice(
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": False},
        ("yes", "no"),
        1,
        "is ice cold?",
        "Ice is frozen water.",
    ),
    "boolq_long": choice(
        LONG | {"answers": ["yes"], "input": "did Mara lead"},
        ("yes", "no"),
        0,
        "did Mara lead?",
        LONG["context"],
    ),
    "anli": choice(
        ANLI, ("entailment", "neutral", "contradiction"), 0, ANLI["premise"], ANLI["hypothesis"]
    ),
    "anli_r2": choice(
        ANLI | {"label": 1}, ("entailment", "neutral", "contradiction"), 1, ANLI["premise"]
    ),
    "anli_r3": choice(
        ANLI | {"label": 2}, ("entailment", "neutral", "contradiction"), 2, ANLI["premise"]
    ),
    "paws": choice(
        {
            "id": 1,
            "sentence1": "Flights from A to B.",
            "sentence2": "Flights from B to A.",
            "label": 0,
        },
        ("yes", "no"),
        1,
        "Flights from A to B.",
        "Flights from B to A.",
    ),
    "cosmos_qa": choice(
        {
            "id": "x",
            "context": "It poured and I had no coat.",
            "question": "How did I feel?",
            "label": 2,
        }
        | {f"answer{at}": text for at, text in enumerate(("Dry .", "Rich .", "Wet .", "Tall ."))},
        ("Dry .", "Rich .", "Wet .", "Tall ."),
        2,
        "It poured and I had no coat.",
        "How did I feel?",
        "Wet .",
    ),
    "arc_easy": choice(ARC, FOUR, 1, ARC["question"], *FOUR),
    "arc_challenge": choice(
        ARC | {"choices": {"text": list(FOUR), "label": ["1", "2", "3", "4"]}, "answerKey": "4"},
        FOUR,
        3,
        ARC["question"],
        *FOUR,
    ),
    "openbookqa": choice(
        {
            "id": "x",
            "question_stem": "Iron is drawn by",
            "choices": ARC["choices"],
            "answerKey": "B",
        },
        FOUR,
        1,
        "Iron is drawn by",
        *FOUR,
    ),
    "winogrande": choice(
        {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
        ("Ann", "Eve"),
        1,
        "Ann thanked Eve because _ had helped.",
    ),
    "hellaswag": choice(
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "A man sifts flour.",
            "ctx_b": "he",
            "source_id": "w",
            "split": "train",
            "split_type": "indomain",
            "ctx": "[header] How to bake [title] Sift flour. he",
            "endings": ["adds eggs.", "[step] rides a horse.", "melts.", "sings."],
            "label": "0",
        },
        ("adds eggs.", "rides a horse.", "melts.", "sings."),
        0,
        "How to bake. Sift flour. he",
        "rides a horse.",
    ),
    "mmlu": choice(
        {
            "question": "2 + 2 =",
            "subject": "abstract_algebra",
            "choices": ["0", "2", "3", "4"],
            "answer": 3,
        },
        ("0", "2", "3", "4"),
        3,
        "2 + 2 =",
    ),
    "squad": Expected(
        SQUAD, "1947", (SQUAD["context"], SQUAD["question"]), ("1947", "in 1947"), hidden=False
    ),
    "xquad": Expected(
        SQUAD, "1947", (SQUAD["context"], SQUAD["question"]), ("1947", "in 1947"), hidden=False
    ),
    "truthfulqa": Expected(
        TRUTH, "Yes, bats can see", ("Can bats see?",), ("Yes, bats can see", "Yes")
    ),
    "truthfulqa_mc": Expected(
        MC,
        "Yes, bats can see",
        ("Can bats see?",),
        ("Yes, bats can see", "Yes"),
        ("Yes, bats can see", "Yes", "No"),
        (0, 1),
    ),
    "truthfulqa_mc1": Expected(
        MC, "Yes, bats can see", ("Can bats see?",), (), ("Yes, bats can see", "No"), (0,)
    ),
    "gsm8k": Expected(
        {
            "question": "A box holds 3 rows of 4 cups. How many cups?",
            "answer": "It is 3*4=<<3*4=12>>12 cups.\n#### 12",
        },
        "It is 3*4=12 cups.\n#### 12",
        ("A box holds 3 rows of 4 cups. How many cups?",),
        ("12",),
    ),
    "svamp": Expected(
        {
            "ID": "chal-1",
            "Body": "If Dan has 3 pears and eats 1",
            "Question": "How many are left?",
            "Equation": "( 3.0 - 1.0 )",
            "Answer": "2.0",
            "Type": "Subtraction",
            "question_concat": "...",
        },
        "2",
        ("If Dan has 3 pears and eats 1, how many are left?",),
    ),
    "alpaca": Expected(
        {"instruction": "Sort these.", "input": "b a", "output": "a b", "text": "Below ..."},
        "a b",
        ("Sort these.", "b a"),
    ),
    "dolly": Expected(
        {
            "instruction": "Name the river.",
            "context": "Cologne is on the Rhine.",
            "response": "It is the Rhine.",
            "category": "closed_qa",
        },
        "It is the Rhine.",
        ("Name the river.", "Cologne is on the Rhine."),
    ),
    "quora": Expected(
        {"question": "Why is the sky blue?", "answer": "Air scatters blue light most."},
        "Air scatters blue light most.",
        ("Why is the sky blue?",),
    ),
    "tofu": Expected(
        {"question": "Who is Ada Vorn?", "answer": "Ada Vorn writes crime novels."},
        "Ada Vorn writes crime novels.",
        ("Who is Ada Vorn?",),
    ),
    **{
        f"longbench_{name}": Expected(
            LONG, "Mara", (LONG["context"], LONG["input"]), ("Mara", "Mara Quell"), hidden=False
        )
        for name in (
            "narrativeqa",
            "qasper",
            "multifieldqa_en",
            "hotpotqa",
            "2wikimqa",
            "musique",
            "qmsum",
            "triviaqa",
            "samsum",
            "passage_retrieval_en",
            "repobench_p",
            "multifieldqa_zh",
            "dureader",
            "passage_retrieval_zh",
        )
    },
    **{
        f"longbench_{name}": Expected(
            LONG | {"input": ""}, "Mara", (LONG["context"],), ("Mara", "Mara Quell"), hidden=False
        )
        for name in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    },
    **{
        f"longbench_{name}": choice(
            CLASSED, ("Food", "Individual", "Date"), 1, LONG["context"], CLASSED["input"]
        )
        for name in ("trec", "lsht")
    },
}

COQA = {
    "source": "wikipedia",
    "story": "Tom has a red kite. It broke.",
    "questions": ["Who has a kite?", "What colour?", "Is it whole?"],
    "answers": {
        "input_text": ["Tom", "red", "no"],
        "answer_start": [0, 10, 20],
        "answer_end": [3, 13, 29],
    },
}
