"""Descriptions on disk: what YAML and JSON mean here, where errors stand, hostile files, dump and
back.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorry.config import RunConfig, build_settings, dump_settings, parse_settings
from lorry.config.parsing.files import (
    LARGEST_DESCRIPTION,
    blank_comments,
    read_description_file,
    read_scalar,
)
from lorry.errors import ConfigError
from lorry.visible import is_visible


def write(tmp_path: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(tmp_path: Path, text: str | bytes, name: str = "run.yaml") -> RunConfig:
    return parse_settings(RunConfig, [str(write(tmp_path, text, name))], print)


def test_yaml_and_json_mean_the_same(tmp_path: Path) -> None:
    values = {
        "data": {"path": ["a.jsonl"], "eval": "b.jsonl"},
        "lora": {"r": 4},
        "learning_rate": 1e-3,
        "train": {"seed": 3},
    }
    one = read(tmp_path, json.dumps(values, indent="\t"), "run.json")
    assert one == read(tmp_path, yaml.safe_dump(values))
    assert one == build_settings(RunConfig, values, print)


def test_flat_trl_style_yaml(tmp_path: Path) -> None:
    r = read(
        tmp_path,
        "model_name_or_path: x\ndataset_name: f.jsonl\nlearning_rate: 2e-5\nlora_r: 4\neval_strategy: no\nbf16: true\n",
    )
    assert r.lora is not None
    assert (r.model.name, r.data.path, r.train.learning_rate, r.lora.r, r.model.dtype) == (
        "x",
        "f.jsonl",
        2e-5,
        4,
        "bfloat16",
    )
    assert r.train.eval_strategy == "no"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 1e-3), ("1.e5", 1e5), (".5", 0.5), ("-1", -1), ("010", 10), ("0x10", 16), ("0o10", 8), ("no", "no"), ("on", "on"),
     ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("true", True), ("False", False), ("null", None),
     ("~", None), ("", None), ("'1'", "1"), ("[1, a]", [1, "a"]), ("{a: 1e3}", {"a": 1000.0}), ("e5", "e5"),
     (".", "."), ("-", [None])],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, expected: Any) -> None:
    found = read_scalar(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: x\nlora:\n  r: 4\n  rnk: 8\n",
            "run.yaml:4: unknown setting 'lora.rnk' (did you mean 'lora.r",
        ),
        (
            "data: x\n\nlerning_rate: 1\n",
            "run.yaml:3: unknown setting 'lerning_rate' (did you mean 'learning_rate'?)",
        ),
        ("data: x\ntrain:\n  seed: -1\n", "run.yaml:3: train.seed: got -1"),
        (
            "data: x\nseed: 1\nlora: {r: 1}\nseed: 2\n",
            "run.yaml:4: 'seed' is given twice (first in line 2)",
        ),
        ("data: x\nlora:\n  r: 1\n  r: 2\n", "run.yaml:4: 'r' is given twice (first in line 3)"),
        ("data: x\nlora: {rank_pattern: {q: 1, q: 2}}\n", "run.yaml:2: 'q' is given twice"),
        ("data: x\nr: 1\nlora:\n  r: 2\n", "run.yaml:4: r and lora.r both set lora.r; keep one"),
        (
            "data: x\ncutoff_len: 1\nmax_length: 2\n",
            "run.yaml:3: cutoff_len and max_length both set data.max_length",
        ),
        ("data: x\n  bad\n indent: 1\n", "run.yaml:3: not YAML"),
        ("data: [a\n", "not YAML"),
        ("data: x\ntrain: 5\n", "run.yaml:2: 'train' is a group"),
        ("- a\n", "is a map of settings"),
        ("data: x\n---\ndata: y\n", "run.yaml:2: not YAML"),
        ("data: x\n1: y\n", "run.yaml:2: a key must be text"),
        ("data: x\n? [a]\n: y\n", "run.yaml:2: a key must be text"),
        (
            "data: x\nmodel: !!python/object/apply:os.system ['echo hi']\n",
            "run.yaml:2: the tag 'tag:yaml.org,2002:python/object",
        ),
        ("data: x\nmodel: !!binary aGk=\n", "run.yaml:2: the tag"),
        ("data: x\nmodel: !mine y\n", "run.yaml:2: the tag '!mine' is not allowed"),
        (
            "data: x\npacking: !!bool maybe\n",
            "run.yaml:2: not YAML: a boolean has to be true or false",
        ),
        ("data: x\nseed: !!int abc\n", "run.yaml:2: not YAML: 'abc' is not an integer"),
        ("data: x\nlora: &a {<<: {r: 1}}\n", "unknown setting 'lora.<<'"),
        ("data: *nobody\n", "run.yaml:1: not YAML"),
        ("data: &a [*a]\n", "run.yaml:1: an alias is inside the value that it names"),
        ("lora: &a\n  r: *a\ndata: x\n", "an alias is inside the value that it names"),
        ("data: x\nrun_name: a\x07b\n", "run.yaml: not YAML"),
        (b"data: x\nrun_name: \xff\n", "run.yaml:2: not UTF-8 text"),
        ("data: " + "[" * 2000, "nested too deeply"),
        ("data: x\n#" + "x" * LARGEST_DESCRIPTION, "run.yaml is larger than 262144 bytes"),
        ("seed: " + "9" * 5000, "run.yaml:1: not YAML: 9999999999"),
        (
            "data: x\nlearning_rate: 1e999\n",
            "run.yaml:2: not YAML: '1e999' is too large for a float",
        ),
        (
            "data: x\nseed: 9223372036854775808\n",
            "run.yaml:2: not YAML: 9223372036854775808 is too large",
        ),
    ],
)
def test_bad_yaml_gets_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_python_tags_run_nothing(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    with pytest.raises(ConfigError, match="is not allowed"):
        read(tmp_path, f"data: !!python/object/apply:os.mkdir ['{target}']\n")
    assert not target.exists()


def test_billion_laughs_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [lol, lol]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)
    ]
    with pytest.raises(ConfigError, match="its aliases expand to more than 262144 values"):
        read(tmp_path, "\n".join(lines))
    nested = "data:\n" + "".join(
        f"  - &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30)
    )
    with pytest.raises(
        ConfigError, match="its aliases expand to more than 262144 values"
    ) as caught:
        read(tmp_path, nested)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": "x",\n"lora": {"r": 0}}', "run.json:2: lora.r: got 0"),
        ('{"data": "x",\n"lora": {"rnk": 8}}', "run.json:2: unknown setting 'lora.rnk'"),
        ('{"data": "x", "data": "y"}', "run.json:1: not JSON ('data' is given twice"),
        ('{"data": "x",\n}', "run.json:2: not JSON"),
        ("[1]", "is a map of settings"),
        ("{" + '"lora": {' * 20000, "nested too deeply"),
        ('{"data": "x", "seed": ' + "9" * 5000 + "}", "run.json:1: not JSON (999"),
        ('{"data": "x", "learning_rate": NaN}', "run.json:1: not JSON (NaN is not a JSON number)"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "run.json")
    assert message in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"no/such\.yaml: cannot be read \(No such file"):
        parse_settings(RunConfig, ["no/such.yaml"], print)


def test_a_byte_order_mark_and_an_empty_file(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfdata: x\n").data.path == "x"
    assert read_description_file(write(tmp_path, "# nothing\n")).values == {}


@settings(max_examples=200)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(max_size=80).map(str.encode),
        st.text("ab: -[]{}&*!|>'\"#\n<", max_size=60).map(str.encode),
    )
)
def test_any_file_is_read_or_refused_in_words(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.yaml", "a.json"):
            with contextlib.suppress(ConfigError):
                parse_settings(RunConfig, [str(write(Path(folder), text, name))], print)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PATHS = TEXT.filter(lambda t: bool(t.strip()) and "\0" not in t and not t.startswith("~"))
RATES = st.floats(min_value=1e-12, max_value=1e6)
COUNTS = st.integers(1, 10**12)
ALPHAS = st.floats(min_value=1e-12, max_value=2**31, allow_nan=False)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "model.name": PATHS,
    "model.revision": st.none() | TEXT,
    "model.dtype": st.sampled_from(["auto", "float32", "bf16"]),
    "model.device": st.sampled_from(["cpu", "cuda:1"]),
    "lora.r": st.integers(1, 2**30),
    "lora.lora_alpha": st.none() | st.integers(1, 2**31) | ALPHAS,
    "lora.target_modules": st.sampled_from(["auto", "all-linear", r".*\.q_proj", "q_proj"])
    | st.lists(TEXT, min_size=1, max_size=3),
    "lora.rank_pattern": st.dictionaries(TEXT, COUNTS, max_size=3),
    "lora.alpha_pattern": st.dictionaries(TEXT, st.integers(1, 2**31) | ALPHAS, max_size=3),
    "lora.layers_to_transform": st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99)),
    "lora.init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    "data.path": PATHS | st.lists(PATHS, min_size=1, max_size=3),
    "data.system": st.none()
    | TEXT
    | st.sampled_from(
        ["no", "1e-3", "null", "0o7", "=", "<<", "2024-01-01", "a: b", " x ", "\n", "\x85"]
    ),
    "data.test_size": st.none() | COUNTS | st.floats(0.001, 0.999),
    "data.completion_only_loss": st.none() | st.booleans(),
    "data.packing": st.booleans(),
    "train.learning_rate": RATES,
    "train.adam_epsilon": RATES,
    "train.warmup_steps": st.integers(0, 100),
    "train.save_total_limit": st.none() | COUNTS,
    "train.resume_from_checkpoint": st.none()
    | st.just("auto")
    | PATHS.filter(lambda t: t.lower() not in ("true", "false")),
    "train.report_to": st.lists(st.sampled_from(["wandb", "trackio"]), unique=True),
    "train.run_name": st.none() | TEXT,
    "output_dir": st.none() | PATHS.filter(str.isprintable).filter(is_visible),
}


@example({"data.path": "x", "lora.alpha_pattern": {"\x85": 1}})
@given(
    st.fixed_dictionaries(
        {"data.path": SETTINGS["data.path"]},
        optional={k: v for k, v in SETTINGS.items() if k != "data.path"},
    )
)
def test_dump_reads_back_to_the_same_run(chosen: dict[str, Any]) -> None:
    run = build_settings(RunConfig, chosen, print)
    text = dump_settings(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        again = parse_settings(RunConfig, [str(path)], print)
    assert again == run
    assert dump_settings(again) == text
    assert (
        type(again.lora.lora_alpha) is type(run.lora.lora_alpha)
        if again.lora and run.lora
        else True
    )
    assert yaml.safe_load(text) == run.model_dump(mode="json"), (
        "a YAML 1.1 reader sees something else"
    )


def test_dump_without_adapter() -> None:
    run = build_settings(RunConfig, {"data": "x", "lora": None}, print)
    assert yaml.safe_load(dump_settings(run))["lora"] is None


def test_json_may_have_comments(tmp_path: Path) -> None:
    """Lines and columns of errors stay; what looks like one in a text is text."""
    run = read(
        tmp_path,
        '{ // the rows\n "data": "a//b.jsonl", /* two\n lines */ "learning_rate": 1e-3 // so\n}',
        "run.json",
    )
    assert run.data.path == "a//b.jsonl"
    assert run.train.learning_rate == 1e-3
    with pytest.raises(ConfigError, match=r"run.json:3: lora.r: got 0"):
        read(tmp_path, '{"data": "x", /* one\n*/\n"lora": {"r": 0} // none\n}', "run.json")
    with pytest.raises(ConfigError, match=r"run.json:\d: not JSON"):
        read(tmp_path, '{"data": "x" /* never closed\n}', "run.json")


@given(st.text(alphabet='"\\/*ab \n', max_size=40))
def test_comments_leave_every_text_and_line_where_it_was(text: str) -> None:
    assert len(blank_comments(text)) == len(text)
    assert blank_comments(text).count("\n") == text.count("\n")
    whole = json.dumps({"data": text})
    assert blank_comments(whole) == whole
