"""The sets of LongBench (Bai et al. 2024): long contexts, one column layout, and the answer lengths
its authors set.

Try: ``named("qmsum").max_new_tokens`` is 512. Every set is for evaluation only; contexts are kept
whole, the model's own limit cuts them.

The authors score trec and lsht as classification and code by edit similarity; here the classes are
ranked (accuracy) and chrF stands for the latter. The authors' own hub copy (zai-org/LongBench) is a
loading script; the set is read from the Parquet copy that the lm-evaluation-harness uses, or from a
file of the authors' archive.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorry.data.catalog.item import (
    ItemFields,
    choice_fields,
    generative_fields,
    unknown_label_error,
)
from lorry.data.catalog.layouts import (
    RowColumns,
    make_layout,
    required_text,
    row_answers,
    text_list,
)
from lorry.data.catalog.named import NamedSet
from lorry.data.reading.content import optional_text


@dataclass(frozen=True)
class LongBenchKind:
    """What sets of one kind share: how they are asked and measured. ``ranked``: the classes of the
    row are the options.
    """

    templates: tuple[str, ...]
    metrics: tuple[str, ...]
    cue: str = "Answer:"
    ranked: bool = False


QA = LongBenchKind(
    (
        "{context}\n\nAnswer in as few words as you can, from the text above alone.\n\nQuestion: {question}",
        "The question will be: {question}\n\nThe text to answer it from:\n{context}\n\nNow give the answer, nothing else.",
        "Source material:\n{context}\n\nReply with a short phrase: {question}",
        'Search this for the answer to "{question}"\n{context}\n\nWhat did you find? A few words will do.',
    ),
    ("token_f1", "exact_match", "rouge_l"),
)
QUERY = LongBenchKind(
    (
        "{context}\n\nThe above is the record of a meeting. {question}",
        "Minutes are wanted on this point: {question}\n\nWhat was said:\n{context}\n\nWrite them in a paragraph.",
        "Meeting:\n{context}\n\nA colleague who was not there asks: {question}\nReply in a few sentences.",
        "From the transcript below, answer the request.\n\nRequest: {question}\n\nTranscript:\n{context}",
    ),
    ("rouge_l", "rouge_1", "rouge_2"),
)
SUMMARY = LongBenchKind(
    (
        "{context}\n\nSum up the above in about a page.",
        "Write a summary, one page long, of what follows.\n\n{context}",
        "Your reader has no time for all of this:\n{context}\n\nGive them one page with everything that matters.",
        "Document:\n{context}\n\nA page-long digest of it, please.",
    ),
    ("rouge_l", "rouge_1", "rouge_2"),
    "Summary:",
)
# The inputs of these close with a cue of their own, as the examples before them do: "Type:",
# "Summary:".
LIKE_EXAMPLES = LongBenchKind(
    (
        "{context}\n{question}",
        "Go on as the examples do.\n\n{context}\n{question}",
        "Solved cases come first, then one that is yours.\n\n{context}\n\n{question}",
        "Do for the last entry what was done for those before it:\n{context}\n{question}",
    ),
    ("token_f1", "exact_match", "rouge_l"),
    "",
)
LIKE_SUMMARIES = LongBenchKind(LIKE_EXAMPLES.templates, ("rouge_l", "rouge_1", "rouge_2"), "")
CLASSES = LongBenchKind(LIKE_EXAMPLES.templates, ("accuracy",), "", ranked=True)
COUNT = LongBenchKind(
    (
        "{context}\n\nSome of the paragraphs above are copies of others. How many are different? Reply with the number.",
        "Count the distinct paragraphs here, a repeated one only once:\n\n{context}\n\nThe count alone, in digits.",
        "{context}\n\nLeave out every repetition. How many paragraphs remain? Give a number.",
        "How many unique paragraphs does this collection hold?\n\n{context}\n\nAnswer in digits.",
    ),
    ("number_match", "exact_match"),
)
FIND = LongBenchKind(
    (
        '{context}\n\nA summary of one of these paragraphs: {question}\n\nWhich one? Write "Paragraph" and its number.',
        'Summary: {question}\n\nIt was made from one of these:\n{context}\n\nName it, as in "Paragraph 7".',
        'Paragraphs:\n{context}\n\nMatch this abstract to its paragraph ("Paragraph" and the number): {question}',
        'Which paragraph does the abstract condense?\n\nAbstract: {question}\n\n{context}\n\nAnswer like "Paragraph 12".',
    ),
    ("exact_match", "token_f1"),
)
CODE = LongBenchKind(
    (
        "{context}\n\n{question}",
        "Which line comes next in this program?\n\n{context}\n\n{question}",
        "Continue the code by exactly one line.\n\n{context}\n\n{question}",
        "An editor has to guess what is typed after this:\n\n{context}\n\n{question}",
    ),
    ("chrf", "exact_match"),
    "Next line of code:",
)
QA_ZH = LongBenchKind(
    (
        "{context}\n\n请只根据上文，用尽量少的字回答。\n\n问题：{question}",
        "问题是：{question}\n\n答案在下面的材料里：\n{context}\n\n请直接给出答案。",
        "材料：\n{context}\n\n有人问：{question}\n请简短回答。",
        "读完下文后回答“{question}”\n{context}\n\n只写答案。",
    ),
    ("rouge_l", "token_f1"),
    "回答：",
)
SUMMARY_ZH = LongBenchKind(
    (
        "{context}\n\n请总结以上会议的内容。",
        "下面是一次会议的记录，请写出要点。\n\n{context}",
        "有人没能参加这次会议：\n{context}\n\n请用一段话告诉他会上说了什么。",
        "会议记录：\n{context}\n\n写一份总结。",
    ),
    ("rouge_l", "rouge_1", "rouge_2"),
    "总结：",
)
CLASSES_ZH = LongBenchKind(
    (
        "{context}\n{question}",
        "参照前面的例子，判断最后一条新闻的类别。\n\n{context}\n{question}",
        "先看例子，再给最后一条分类。\n\n{context}\n\n{question}",
        "按照例子的做法，说出最后一条属于哪一类：\n{context}\n{question}",
    ),
    ("accuracy",),
    "",
    ranked=True,
)
FIND_ZH = LongBenchKind(
    (
        "{context}\n\n这是其中一段的摘要：{question}\n\n它出自哪一段？按“段落1”这样的格式回答。",
        "摘要：{question}\n\n它来自下面的某一段：\n{context}\n\n请写出段落编号，例如“段落7”。",
        "段落：\n{context}\n\n为这个摘要找到原文（写“段落”和编号）：{question}",
        "下面哪一段与摘要相符？\n\n摘要：{question}\n\n{context}\n\n用“段落12”的格式回答。",
    ),
    ("exact_match", "rouge_l"),
    "回答：",
)

# LongBench's name: (kind, tokens of an answer as its authors set them, what it is, who made it)
LONGBENCH_TABLE: dict[str, tuple[LongBenchKind, int, str, str]] = {
    "narrativeqa": (
        QA,
        128,
        "questions about books and film scripts",
        "Kocisky et al. 2018, NarrativeQA",
    ),
    "qasper": (
        QA,
        128,
        "questions about papers of language processing",
        "Dasigi et al. 2021, Qasper",
    ),
    "multifieldqa_en": (QA, 64, "questions about long articles of many fields", ""),
    "hotpotqa": (
        QA,
        32,
        "questions that need two Wikipedia articles",
        "Yang et al. 2018, HotpotQA",
    ),
    "2wikimqa": (
        QA,
        32,
        "questions that need several Wikipedia articles",
        "Ho et al. 2020, 2WikiMultihopQA",
    ),
    "musique": (
        QA,
        32,
        "questions of up to four steps over articles",
        "Trivedi et al. 2022, MuSiQue",
    ),
    "gov_report": (
        SUMMARY,
        512,
        "reports of government agencies, summed up",
        "Huang et al. 2021, GovReport",
    ),
    "qmsum": (QUERY, 512, "requests about the transcript of a meeting", "Zhong et al. 2021, QMSum"),
    "multi_news": (
        SUMMARY,
        512,
        "several news articles, summed up together",
        "Fabbri et al. 2019, Multi-News",
    ),
    "trec": (CLASSES, 64, "the type of a question, after many examples", "Li and Roth 2002, TREC"),
    "triviaqa": (
        LIKE_EXAMPLES,
        32,
        "trivia with a passage, after examples",
        "Joshi et al. 2017, TriviaQA",
    ),
    "samsum": (
        LIKE_SUMMARIES,
        128,
        "chats summed up, after many examples",
        "Gliwa et al. 2019, SAMSum",
    ),
    "passage_count": (COUNT, 32, "how many of the paragraphs are different", ""),
    "passage_retrieval_en": (FIND, 32, "which of thirty paragraphs a summary is of", ""),
    "lcc": (CODE, 64, "the next line of a long program", "Guo et al. 2023, LongCoder"),
    "repobench-p": (
        CODE,
        64,
        "the next line, given other files of the repository",
        "Liu et al. 2023, RepoBench",
    ),
    "multifieldqa_zh": (QA_ZH, 64, "questions about long Chinese articles", ""),
    "dureader": (QA_ZH, 128, "Chinese search questions with documents", "He et al. 2018, DuReader"),
    "vcsum": (SUMMARY_ZH, 512, "Chinese meetings, summed up", "Wu et al. 2023, VCSum"),
    "lsht": (
        CLASSES_ZH,
        64,
        "the class of a Chinese news item, after many examples",
        "NLPCC 2014, LSHT",
    ),
    "passage_retrieval_zh": (FIND_ZH, 32, "which Chinese paragraph a summary is of", ""),
}


def _longbench_fields(row: RowColumns) -> ItemFields:
    return generative_fields(
        {"context": required_text(row, "context"), "question": optional_text(row, "input")},
        row_answers(row, "answers"),
    )


def _ranked_fields(row: RowColumns) -> ItemFields:
    options = [name.strip() for name in text_list(row["all_classes"], "all_classes")]
    answers = row_answers(row, "answers")
    if missing := [answer for answer in answers if answer not in options]:
        raise unknown_label_error(missing[0], options)
    slots = {"context": required_text(row, "context"), "question": required_text(row, "input")}
    return choice_fields(slots, options, [options.index(answer) for answer in answers])


def _longbench_set(
    name: str, kind: LongBenchKind, tokens: int, about: str, source: str
) -> NamedSet:
    form = (
        make_layout("longbench", "context answers all_classes", _ranked_fields)
        if kind.ranked
        else make_layout("longbench", "context answers", _longbench_fields)
    )
    return NamedSet(
        name=f"longbench_{name.replace('-', '_')}",
        about=f"LongBench: {about}",
        hub="Xnhyacinth/LongBench",
        config=name,
        splits={"validation": "test", "test": "test"},
        layouts=(form,),
        templates=kind.templates,
        metrics=kind.metrics,
        max_new_tokens=tokens,
        cue=kind.cue,
        licence="MIT for the collection; the texts are under the licences of their own sets",
        source="; ".join(filter(None, (source, "Bai et al. 2024, LongBench (arXiv 2308.14508)"))),
    )


SETS = tuple(_longbench_set(name, *row) for name, row in LONGBENCH_TABLE.items())
