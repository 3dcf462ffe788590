"""``halos sample``: rows are neither lost nor repeated after a kill, whatever the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import Server, completion, serving
from run_halos import one_error, write_jsonl

import halos_pl.common.files as files
import halos_pl.sampling.local as local
from halos_pl.cli.main import main
from halos_pl.sampling.sample_file import SampleFile


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts of several lengths, so that rows do not finish in the order of the file; line 3 is empty."""
    lines = [f"question {i}" + " why" * (7 * i % 5) for i in range(6)]
    path = tmp_path / "p.txt"
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    return path


def words(model: Path | str, prompts: Path, out: Path, *options: str) -> list[str]:
    return ["sample", str(model), f"--prompts={prompts}", f"--out={out}", "--max_new_tokens=3", *options]


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fails at the call after ``number`` batches; the calls that were made."""
    calls: list[int] = []
    real = local.draw

    def draw(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(local, "draw", draw)
    return calls


@pytest.mark.parametrize("one_per_row", ["false", "true"])
def test_a_resumed_command_gives_the_file_of_an_uninterrupted_one(
    tiny_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, one_per_row: str
) -> None:
    options = ["--n=3", "--batch_size=7", "--temperature=2", f"--one_per_row={one_per_row}"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    main(words(tiny_folder, prompts, whole, *options))
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    size = 3 if one_per_row == "true" else 1
    assert [row["prompt_row"] for row in rows] == [line for line in (1, 2, 4, 5, 6, 7) for _ in range(size)]
    seeds = [row["seed"] for row in rows]
    assert len({*map(str, seeds)}) == len(rows)
    for row in rows:
        sums = [row["logprob"]] if size == 3 else row["logprob"]
        tokens = [row["token_logprobs"]] if size == 3 else row["token_logprobs"]
        assert sums == pytest.approx([sum(each) for each in tokens])
    command = words(tiny_folder, prompts, out, *options)
    calls = stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        main(command)
    part = tmp_path / "out.jsonl.halos.part"
    assert not out.exists()
    assert len(part.read_text().splitlines()) == 4 * size  # two prompts of three completions in a batch of seven
    part.write_bytes(part.read_bytes()[:-5])  # as a kill may leave it
    main(command)
    assert out.read_bytes() == whole.read_bytes()
    assert calls == [6, 6, 6, 6, 6]  # the second batch again, for its torn row
    assert not part.exists()
    capfd.readouterr()
    main(command)
    assert "complete" in capfd.readouterr().out
    assert len(calls) == 5


def test_other_settings_are_refused_and_named(
    tiny_folder: Path,
    tiny_gpt2_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    out = tmp_path / "out.jsonl"
    stop_after(1, monkeypatch)
    with pytest.raises(SystemExit):
        main(words(tiny_folder, prompts, out, "--batch_size=2"))
    monkeypatch.undo()
    part = out.with_name("out.jsonl.halos.part")
    before = part.read_bytes()
    changed = ("--temperature=0.5", "--n=2", "--seed=1", "--max_new_tokens=4", "--batch_size=3", "--control=x")
    for option in changed:
        line = one_error(words(tiny_folder, prompts, out, "--batch_size=2", option), capfd)
        assert option.strip("-").partition("=")[0] in line
    assert "model" in one_error(words(tiny_gpt2_folder, prompts, out, "--batch_size=2"), capfd)
    assert part.read_bytes() == before
    main(words(tiny_folder, prompts, out, "--batch_size=2"))
    complete = out.read_bytes()
    assert "temperature" in one_error(words(tiny_folder, prompts, out, "--batch_size=2", "--temperature=0"), capfd)
    prompts.write_text("another\n")
    assert "prompts" in one_error(words(tiny_folder, prompts, out, "--batch_size=2"), capfd)
    assert out.read_bytes() == complete
    main(words(tiny_folder, prompts, out, "--batch_size=2", "--overwrite=true"))
    assert len(out.read_text().splitlines()) == 1


def test_a_foreign_or_changed_file_is_not_replaced(
    tiny_folder: Path, prompts: Path, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    assert str(out) in one_error(words(tiny_folder, prompts, out), capfd)
    assert out.read_text() == "mine\n"
    main(words(tiny_folder, prompts, out, "--overwrite=true"))
    labelled = out.read_text().replace('"finished"', '"scores": [1], "finished"')
    out.write_text(labelled)
    assert "changed" in one_error(words(tiny_folder, prompts, out), capfd)
    assert out.read_text() == labelled


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    import multiprocessing

    def take(ready: Any, leave: Any) -> None:
        file = SampleFile(tmp_path / "out.jsonl", {"n": 1}, 1)
        file.begin({})
        ready.set()
        leave.wait(60)

    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=take, args=(ready, leave))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(FileExistsError, match="another process"):
            SampleFile(tmp_path / "out.jsonl", {"n": 1}, 1).begin({})
    finally:
        leave.set()
        other.join()


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "out.jsonl", {"n": 1}, 1)
    file.begin({})
    file.add(1, [{"completion": "a"}])
    file.close()
    file.part.write_text("[]\n" + file.part.read_text())
    with pytest.raises(ValueError, match=r"part:1 "):
        SampleFile(tmp_path / "out.jsonl", {"n": 1}, 1).begin({})


def written(out: Path, rows: dict[int, dict[str, Any]]) -> SampleFile:
    """The file of a command that writes ``rows``, and resumes what is there."""
    file = SampleFile(out, {"n": 1}, 1)
    file.begin({"model": "m"})
    if not file.complete:
        for number in rows.keys() - file.done:
            file.add(number, [rows[number]])
        file.finish()
    return file


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\u0085b", "a\x1c\x0b\rb", "half of \ud83d", "\u00e9"])
def test_any_text_survives_a_kill_and_the_end(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.jsonl"
    file = SampleFile(out, {"n": 1}, 1)
    file.begin({"model": "m"})
    file.add(2, [{"completion": text}])
    file.close()
    written(out, {1: {"completion": text}, 2: {"completion": "not drawn again"}})
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == [
        {"completion": text, "prompt_row": number} for number in (1, 2)
    ]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("at", range(3))  # the record at the beginning, that at the end, and the file
def test_a_kill_at_any_step_leaves_the_rest_to_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, replaced: bool
) -> None:
    rows = {number: {"completion": str(number)} for number in (1, 2)}
    written(tmp_path / "whole.jsonl", rows)
    out, calls, real = tmp_path / "out.jsonl", [], files.os.replace

    def replace(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) > at + replaced:
            raise KeyboardInterrupt
        real(*paths)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        written(out, rows)
    monkeypatch.undo()
    written(out, rows)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part"))
    assert written(out, rows).complete


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 2, 3, 0, 1), (1, 0), (0, 2)], ids=str)
def test_rows_that_are_repeated_or_moved_are_named(tmp_path: Path, size: int, rows: tuple[int, ...]) -> None:
    file = SampleFile(tmp_path / "out.jsonl", {}, size)
    file.begin({})
    for number in (1, 2, 3, 4)[: 4 // size]:
        file.add(number, [{"completion": str(k)} for k in range(size)])
    file.close()
    lines = file.part.read_bytes().splitlines(keepends=True)
    changed = b"".join(lines[i] for i in rows)
    file.part.write_bytes(changed)
    again = SampleFile(tmp_path / "out.jsonl", {}, size)
    if size == 1 and len({*rows}) == len(rows):  # any order is that of some command
        again.begin({})
        assert again.done == {i + 1 for i in rows}
    else:
        with pytest.raises(ValueError, match=r"\.part:\d"):
            again.begin({})
        assert file.part.read_bytes() == changed


def test_a_command_that_wrote_no_row_does_not_block_another(tmp_path: Path) -> None:
    SampleFile(tmp_path / "out.jsonl", {"n": 1}, 1).begin({})
    SampleFile(tmp_path / "out.jsonl", {"n": 2}, 1).begin({})


# -- endpoint -------------------------------------------------------------------------------------------


#: The server of these tests gives no log-probs unless told to.
LESS = ["--logprobs=false"]


def remote(server: Server, prompts: Path, out: Path, *options: str) -> list[str]:
    where = ["--engine=endpoint", f"--endpoint.url={server.url}", "--endpoint.retries=0", "--endpoint.concurrency=1"]
    return words("served", prompts, out, *where, *options)


def test_a_server_fills_the_same_file(prompts: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    pytest.importorskip("openai")
    out = tmp_path / "out.jsonl"
    logprobs = {"content": [{"logprob": -0.25}, {"logprob": -0.5}]}
    with serving() as server:
        server.reply = lambda body: completion(f"seed {body['seed']}", reason="length", logprobs=logprobs)
        server.plan = [*["good"] * 5, (401, {}, None)]
        command = remote(server, prompts, out, "--n=2", "--temperature=0.7")
        assert "api_key_env" in one_error(command, capfd)
        assert not out.exists()
        monkeypatch.setenv("OPENAI_API_KEY", "now-there-is-one")
        main(command)
        assert len(server.requests) == 5 + 1 + 7  # the fifth reply is not asked for again
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt_row"] for row in rows] == [1, 2, 4, 5, 6, 7]
        for row in rows:
            assert row["prompt"][0]["role"] == "user"
            assert row["completions"] == [f"seed {seed}" for seed in row["seed"]]
            assert (row["finished"], row["logprob"]) == ([False, False], [-0.75, -0.75])
            assert "same_tokens" not in row
        body = server.requests[-1]
        assert (body["model"], body["temperature"], body["max_tokens"], body["logprobs"]) == ("served", 0.7, 3, True)
    record = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert record["settings"]["model"] == "served"
    assert "now-there-is-one" not in (tmp_path / "out.jsonl.settings.json").read_text() + out.read_text()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.transcripts.jsonl"))


def test_prompts_that_a_server_refuses_are_named_tried_again_or_skipped(
    prompts: Path, tmp_path: Path, capfd: Any
) -> None:
    pytest.importorskip("openai")
    out = tmp_path / "out.jsonl"
    with serving() as server:
        server.plan = ["good", (400, {}, {"error": {"message": "too long"}})]
        line = one_error(remote(server, prompts, out, *LESS), capfd)
        assert f"{prompts}:2: " in line
        assert "too long" in line
        assert len(server.requests) == 6
        server.plan = [(400, {}, {"error": {"message": "too long"}})]
        main(remote(server, prompts, out, "--skip_failed=true", *LESS))
        assert len(server.requests) == 7
    assert [json.loads(line)["prompt_row"] for line in out.read_text().splitlines()] == [1, 4, 5, 6, 7]
    assert "1 prompt" in capfd.readouterr().out
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["skipped"] == [f"{prompts}:2"]
    skipped = out.read_bytes()
    with serving() as server:
        main(remote(server, prompts, out, "--skip_failed=true", *LESS))
        assert not server.requests  # the same command
        server.plan = [(400, {}, {"error": {"message": "too long"}})]
        assert "too long" in one_error(remote(server, prompts, out, *LESS), capfd)
        assert out.read_bytes() == skipped
        main(remote(server, prompts, out, *LESS))
        assert len(server.requests) == 2  # that prompt alone
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt_row"] for row in rows] == [1, 2, 4, 5, 6, 7]
    assert [json.dumps(row, ensure_ascii=False) for row in rows if row["prompt_row"] != 2] == skipped.decode().split(
        "\n"
    )[:-1]
    assert not list(tmp_path.glob("*.part"))


def test_a_server_without_log_probs_is_refused_at_once(prompts: Path, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("openai")
    out = tmp_path / "out.jsonl"
    with serving() as server:
        assert "--logprobs" in one_error(remote(server, prompts, out), capfd)
        assert len(server.requests) <= 2
        main(remote(server, prompts, out, *LESS, '--endpoint.extra_body={"seed": null}'))
        assert "seed" not in server.requests[-1]
    for line in out.read_text().splitlines():  # no seed was sent
        assert not {"seed", "logprob", "token_logprobs"} & {*json.loads(line)}


@pytest.mark.parametrize("given", [None, {"content": []}, {"content": None}], ids=str)
def test_an_empty_completion_has_no_log_probs(prompts: Path, tmp_path: Path, capfd: Any, given: Any) -> None:
    """Also if it is the first, but only if the model ended it; and the command says how many there are."""
    pytest.importorskip("openai")
    out = tmp_path / "out.jsonl"
    whole = completion("two tokens", logprobs={"content": [{"logprob": -0.25}, {"logprob": -0.5}]})
    with serving() as server:
        server.reply = lambda body: whole
        server.plan = [completion("", logprobs=given), "good", completion(None, logprobs=given)]
        main(remote(server, prompts, out))
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["completions"] for row in rows] == [[""], ["two tokens"], [""], *[["two tokens"]] * 3]
        assert [row["token_logprobs"][0] for row in rows] == [[], [-0.25, -0.5], [], *[[-0.25, -0.5]] * 3]
        assert "empty completions: 2 of 6" in capfd.readouterr().out
        server.plan = [completion("", reason="length", logprobs=given)]
        assert "--logprobs" in one_error(remote(server, prompts, out, "--seed=1", "--overwrite=true"), capfd)
        server.plan = [completion("", logprobs=given), completion("some", logprobs=given)]
        assert "--logprobs" in one_error(remote(server, prompts, out, "--seed=2", "--overwrite=true"), capfd)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--engine=endpoint"], "endpoint.url"),
        (["--endpoint.url=http://x/v1"], "--engine endpoint"),
        (["--endpoint.concurrency=3"], "endpoint.url"),
        (["--skip_failed=true"], "skip_failed"),
        (["--n=2", "--temperature=0"], "temperature"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", "--batch_size=4"], "batch_size"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", '--endpoint.extra_body={"seed": 5}'], "seed"),
        (["--engine=endpoint", "--endpoint.url=x"], "endpoint.url"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", "--endpoint.model=b"], "endpoint.model"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", "--control=c"], "control"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", "--text_prompts=plain"], "text_prompts"),
        (["--engine=endpoint", "--endpoint.url=http://x/v1", "--endpoint.api_key_env=sk-secret"], "api_key_env"),
        (["--engine=endpoint", "--endpoint.url=http://me:secret@x/v1"], "endpoint.url"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    prompts: Path, tmp_path: Path, capfd: Any, options: list[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        main(words("served", prompts, tmp_path / "out.jsonl", *options))
    said = capfd.readouterr().err
    assert word in said
    assert "secret" not in said


def test_prompts_that_only_a_model_here_can_continue_are_named(tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("openai")
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    tool = {"name": "f", "parameters": {}}
    for row in ({"prompt": begun}, {"prompt": begun[:1], "tools": [tool]}):
        path = Path(write_jsonl(tmp_path / "p.jsonl", [row]))
        with serving() as server:
            assert f"{path}:1: " in one_error(remote(server, path, tmp_path / "out.jsonl"), capfd)
            assert server.requests == []
