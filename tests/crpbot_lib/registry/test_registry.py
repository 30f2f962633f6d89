"""Publishing, verifying, promoting and rolling back what a real smoke run trained."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from crpbot_lib import registry
from crpbot_lib.config import PromotionSettings, Settings
from crpbot_lib.features import catalog
from crpbot_lib.lake import Lake, keys
from crpbot_lib.registry import AlignmentError, PromotionRefusedError, RegistryError
from crpbot_lib.training import job, read_status

SETTINGS = Settings(promotion=PromotionSettings(allow_smoke=True))
STRICT = Settings()


@pytest.fixture
def own(trained_lake: Any, tmp_path: Path) -> Any:
    return trained_lake.copy(tmp_path)


@pytest.fixture
def version(own: Any) -> str:
    return str(registry.publish(SETTINGS, own.lake, own.run)["version"])


def evidence(version: str, **changes: Any) -> dict[str, Any]:
    return {"model": version, "not_stuck": True, "iterations": 5, "predictions": predictions(), **changes}


def predictions(btc: int = 5, eth: int = 5, probability: float = 0.6) -> list[dict[str, Any]]:
    return [{"symbol": s, "probability": probability} for s in ["BTC-USD"] * btc + ["ETH-USD"] * eth]


def second_version(own: Any) -> str:
    """The same features trained with another seed, as another run."""
    spec = job.read_spec(own.lake, own.run)
    other = spec.model_copy(update={"run": "run-2", "train": spec.train.model_copy(update={"seed": 1, "max_steps": 3})})
    own.lake.write_json(keys.training_run("run-2", "job.json"), other.model_dump(mode="json"))
    job.run(own.lake, "run-2")
    return str(registry.publish(SETTINGS, own.lake, "run-2")["version"])


def respoil(own: Any, version: str, symbol: str, /, **content: Any) -> None:
    """Replaces entries of a published checkpoint, and its sha256 in the manifest."""
    manifest = registry.show(SETTINGS, own.lake, version)
    entry = manifest["symbols"][symbol]
    key = keys.model("models", version, entry["file"])
    buffer = io.BytesIO()
    torch.save(torch.load(io.BytesIO(own.lake.read(key)), weights_only=True) | content, buffer)
    own.lake.write(key, buffer.getvalue())
    entry["sha256"] = registry.versions.hashlib.sha256(buffer.getvalue()).hexdigest()
    own.lake.write_json(keys.model("models", version, "manifest.json"), manifest)


def contents(lake: Lake) -> dict[str, bytes]:
    return {key: lake.read(key) for key in lake.keys("models/")}


def test_a_published_version_names_its_files_by_content_and_tags_them(own: Any, version: str) -> None:
    manifest = registry.show(SETTINGS, own.lake, version)

    assert version.startswith("smoke-")
    assert manifest["smoke"] is True
    assert manifest["run"] == own.run
    for symbol, slug in (("BTC-USD", "BTC_USD"), ("ETH-USD", "ETH_USD")):
        entry = manifest["symbols"][symbol]
        assert entry["file"] == f"lstm_{slug}_1m_{entry['sha256'][:8]}.pt"
        tags = own.lake.tags(keys.model("models", version, entry["file"]))
        assert tags == {"trained_date": manifest["trained_date"], "gpu": "none", "run": own.run}


def test_publishing_twice_changes_nothing(own: Any, version: str) -> None:
    before = contents(own.lake)

    assert registry.publish(SETTINGS, own.lake, own.run)["version"] == version
    assert contents(own.lake) == before


def test_only_a_succeeded_run_is_published(own: Any) -> None:
    status = read_status(own.lake, own.run)
    own.lake.write_json(keys.training_run(own.run, "status.json"), {**(status or {}), "state": "failed", "error": "it broke"})

    with pytest.raises(RegistryError, match=r"run run-1 is failed \(it broke\); only a succeeded run is published"):
        registry.publish(SETTINGS, own.lake, own.run)
    assert contents(own.lake) == {}


def test_a_model_that_changed_since_its_training_is_not_published(own: Any) -> None:
    own.lake.write(keys.run_symbol(own.run, "BTC-USD", "model.pt"), b"something else")

    with pytest.raises(RegistryError, match=r"BTC-USD: the model of run run-1 has sha256"):
        registry.publish(SETTINGS, own.lake, own.run)
    assert contents(own.lake) == {}


@pytest.mark.parametrize(
    ("field", "value"), [("symbol", "SOL-USD"), ("run", "run-9"), ("feature_version", "v-other"), ("smoke", False)]
)
def test_a_model_whose_metrics_are_not_the_jobs_is_not_published(own: Any, field: str, value: Any) -> None:
    key = keys.run_symbol(own.run, "BTC-USD", "metrics.json")
    own.lake.write_json(key, own.lake.read_json(key) | {field: value})

    with pytest.raises(
        RegistryError, match=rf"BTC-USD: metrics.json of run run-1 is not the job's: {field} is {value!r}, expected"
    ):
        registry.publish(SETTINGS, own.lake, own.run)
    assert contents(own.lake) == {}


@pytest.mark.parametrize(
    ("field", "value"), [("symbol", "SOL-USD"), ("run", "run-9"), ("feature_version", "v-other"), ("smoke", False)]
)
def test_verify_refuses_the_model_of_another_symbol_run_or_features_version(own: Any, version: str, field: str, value: Any) -> None:
    """BTC-USD and SOL-USD share names, order, counts and hash: nothing else would tell their models apart."""
    respoil(own, version, "BTC-USD", **{field: value})

    with pytest.raises(AlignmentError, match=rf"BTC-USD: the checkpoint's {field} is {value!r}, expected"):
        registry.verify(SETTINGS, own.lake, version)


def test_verify_reports_the_three_counts(own: Any, version: str) -> None:
    report = registry.verify(SETTINGS, own.lake, version)

    assert report["aligned"] is True
    assert report["symbols"]["BTC-USD"]["counts"] == {"features_file": 73, "run_time": 73, "checkpoint": 73}
    assert report["symbols"]["ETH-USD"]["counts"] == {"features_file": 54, "run_time": 54, "checkpoint": 54}


def test_verify_refuses_a_changed_file(own: Any, version: str) -> None:
    file = registry.show(SETTINGS, own.lake, version)["symbols"]["BTC-USD"]["file"]
    own.lake.write(keys.model("models", version, file), b"half a mod")

    with pytest.raises(AlignmentError, match=r"BTC-USD: .*has sha256 .*publish run run-1 again"):
        registry.verify(SETTINGS, own.lake, version)


def test_verify_refuses_another_order(own: Any, version: str) -> None:
    names = catalog.feature_names("BTC-USD")
    respoil(own, version, "BTC-USD", names=[names[1], names[0], *names[2:]])

    with pytest.raises(AlignmentError, match=rf"three counts.*order differs from position 0: model {names[1]}, catalog {names[0]}"):
        registry.verify(SETTINGS, own.lake, version)


def test_verify_refuses_a_catalog_that_has_moved_on(own: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "catalog_hash", lambda _groups: "tomorrow")

    with pytest.raises(AlignmentError, match=r"BTC-USD: the model was trained under catalog \w+, today's is tomorrow: retrain"):
        registry.verify(SETTINGS, own.lake, version)


def test_verify_prints_names_that_differ_and_the_counts(own: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    today = [*catalog.feature_names("BTC-USD"), "moon_phase"]
    monkeypatch.setattr(catalog, "names", lambda _groups: today)

    with pytest.raises(
        AlignmentError, match=r"counts differ: features_file 73, run_time 74, checkpoint 73.*not in the model: moon_phase"
    ):
        registry.verify(SETTINGS, own.lake, version)


def test_an_unknown_version_is_named_with_the_known_ones(own: Any, version: str) -> None:
    with pytest.raises(RegistryError, match=rf"no model version 'nope' .*published: {version}"):
        registry.verify(SETTINGS, own.lake, "nope")


def test_promote_moves_the_pointer_and_keeps_the_history(own: Any, version: str) -> None:
    at = datetime(2025, 5, 29, tzinfo=UTC)

    result = registry.promote(SETTINGS, own.lake, version, evidence(version), now=lambda: at)
    registry.promote(SETTINGS, own.lake, version, evidence(version))

    assert result["message"].startswith("SMOKE version")
    assert registry.champions(SETTINGS, own.lake) == {"BTC-USD": version, "ETH-USD": version}
    history = own.lake.read_json(keys.promoted("models"))["history"]
    assert [(e["action"], e["version"], e["at"]) for e in history] == [("promote", version, at.isoformat())]
    assert history[0]["evidence"]["not_stuck"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"not_stuck": False}, "predictions are stuck"),
        ({"predictions": predictions(btc=4)}, "has 4 finite predictions of BTC-USD, promotion asks for 5"),
        ({"predictions": predictions(eth=0)}, "has 0 finite predictions of ETH-USD, promotion asks for 5"),
        ({"predictions": predictions(probability=float("nan"))}, "has 0 finite predictions of BTC-USD"),
        ({"model": "another"}, "a dry run of 'another'"),
    ],
)
def test_promotion_wants_a_dry_run_of_this_version(own: Any, version: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromotionRefusedError, match=reason):
        registry.promote(SETTINGS, own.lake, version, evidence(version, **changes))
    assert registry.champions(SETTINGS, own.lake) == {}


def test_a_smoke_model_is_promoted_only_where_the_setting_says_so(own: Any, version: str) -> None:
    with pytest.raises(PromotionRefusedError, match=r"SMOKE .* is a smoke model and promotion\.allow_smoke is off"):
        registry.promote(STRICT, own.lake, version, evidence(version))


def judged(own: Any, version: str, **metrics: Any) -> None:
    """The published version as if its models were real ones, judged so."""
    key = keys.model("models", version, "manifest.json")
    manifest = own.lake.read_json(key) | {"smoke": False}
    for entry in manifest["symbols"].values():
        entry["metrics"] |= metrics
    own.lake.write_json(key, manifest)


def test_a_real_model_whose_test_rows_show_skill_may_be_promoted(own: Any, version: str) -> None:
    judged(own, version, skill=True, verdict="better than the base rate by 2.0 points")
    registry.check_promotable(STRICT, own.lake, version)


@pytest.mark.parametrize(
    ("skill", "verdict"), [(False, "no skill shown: 0.1 points"), (None, "no verdict: too few windows for an interval")]
)
def test_one_without_is_refused_with_its_verdict_unless_the_setting_says_so(
    own: Any, version: str, skill: bool | None, verdict: str
) -> None:
    judged(own, version, skill=skill, verdict=verdict)

    with pytest.raises(PromotionRefusedError, match=rf"BTC-USD: {verdict}.*set promotion\.allow_without_skill; ETH-USD: {verdict}"):
        registry.check_promotable(STRICT, own.lake, version)
    with pytest.raises(PromotionRefusedError, match=rf"BTC-USD: {verdict}"):
        registry.promote(STRICT, own.lake, version, evidence(version))
    registry.check_promotable(Settings(promotion=PromotionSettings(allow_without_skill=True)), own.lake, version)


def test_a_version_from_before_there_were_verdicts_is_listed_and_refused(own: Any, version: str) -> None:
    judged(own, version)
    key = keys.model("models", version, "manifest.json")
    manifest = own.lake.read_json(key)
    for entry in manifest["symbols"].values():
        for name in ("skill", "verdict", "accuracy_low", "accuracy_high", "auc", "test_windows"):
            del entry["metrics"][name]
    own.lake.write_json(key, manifest)

    assert registry.list_versions(STRICT, own.lake)[0]["symbols"]["BTC-USD"]["skill"] is None
    with pytest.raises(PromotionRefusedError, match="BTC-USD: no verdict: it was trained before there were any"):
        registry.check_promotable(STRICT, own.lake, version)


def test_a_misaligned_version_is_not_promoted(own: Any, version: str) -> None:
    respoil(own, version, "ETH-USD", catalog="yesterday")

    with pytest.raises(PromotionRefusedError, match=r"ETH-USD: the model was trained under catalog yesterday"):
        registry.promote(SETTINGS, own.lake, version, evidence(version))


def test_rolling_back_goes_back_step_by_step(own: Any, version: str) -> None:
    second = second_version(own)
    registry.promote(SETTINGS, own.lake, version, evidence(version))
    registry.promote(SETTINGS, own.lake, second, evidence(second))
    registry.promote(SETTINGS, own.lake, version, evidence(version))

    assert registry.rollback(SETTINGS, own.lake)["version"] == second
    assert registry.rollback(SETTINGS, own.lake)["version"] == version
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback(SETTINGS, own.lake)

    history = own.lake.read_json(keys.promoted("models"))["history"]
    assert [e["action"] for e in history] == ["promote"] * 3 + ["rollback"] * 2
    assert registry.champions(SETTINGS, own.lake) == {"BTC-USD": version, "ETH-USD": version}


def test_versions_are_listed_and_compared(own: Any, version: str) -> None:
    second = second_version(own)

    assert {v["version"] for v in registry.list_versions(SETTINGS, own.lake)} == {version, second}
    found = registry.diff(SETTINGS, own.lake, version, second)
    assert found["changed"]["run"] == ["run-1", "run-2"]
    assert found["train"] == {"max_steps": [30, 3], "seed": [0, 1]}
    assert found["symbols"]["BTC-USD"]["same_model"] is False
    assert found["symbols"]["BTC-USD"]["features_added"] == []
    assert found["symbols"]["BTC-USD"]["metrics"]["steps"] == [30, 3]


def test_a_version_is_downloaded_as_files(own: Any, version: str, tmp_path: Path) -> None:
    paths = registry.download(SETTINGS, own.lake, version, tmp_path / "deployed")

    assert sorted(p.name for p in paths)[-1] == "manifest.json"
    btc = next(p for p in paths if "BTC_USD" in p.name)
    assert torch.load(btc, map_location="cpu", weights_only=True)["input_size"] == 73
