"""The same promises from a directory and from S3: whole objects, conditional writes, tags, sorted keys, clear errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import boto3
import polars as pl
import pytest
from moto.server import ThreadedMotoServer
from polars.testing import assert_frame_equal

from crpbot_lib.lake import KeyExistsError, KeyMissingError, Lake, LakeError, keys


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of moto's S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    resource = boto3.resource("s3")
    resource.create_bucket(Bucket="crpbot-lake")
    yield "crpbot-lake"
    resource.Bucket("crpbot-lake").objects.delete()
    resource.Bucket("crpbot-lake").delete()


@pytest.fixture(params=["directory", "bucket", "bucket and prefix"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Lake:
    if request.param == "directory":
        return Lake(f"file://{tmp_path}/lake")
    name = request.getfixturevalue("bucket")
    return Lake(f"s3://{name}" if request.param == "bucket" else f"s3://{name}/some/prefix/")


def test_what_is_written_is_read(lake: Lake) -> None:
    assert not lake.exists("a/b.bin")
    lake.write("a/b.bin", b"\x00one")
    lake.write("a/b.bin", b"two")
    assert lake.exists("a/b.bin")
    assert not lake.exists("a")
    assert lake.read("a/b.bin") == b"two"


def test_many_are_read_in_the_order_in_which_they_are_asked_for(lake: Lake) -> None:
    for number in range(20):
        lake.write(f"n/{number}", str(number).encode())
    asked = [*range(19, -1, -1), 99, 3]
    assert lake.read_each([f"n/{number}" for number in asked]) == [None if n == 99 else str(n).encode() for n in asked]
    assert lake.read_each([]) == []


def test_an_absent_key_is_named_by_its_address(lake: Lake) -> None:
    for ask in (lake.read, lake.read_json, lake.read_frame, lake.tags):
        with pytest.raises(KeyMissingError, match=f"^{lake.url('a/b')} does not exist$"):
            ask("a/b")


def test_keys_are_sorted_and_begin_with_the_prefix(lake: Lake) -> None:
    for key in ("runs/2/x", "runs/10/x", "runs/10/y", "runs-old/1", "other"):
        lake.write(key, b"")
    assert lake.keys("runs/") == ["runs/10/x", "runs/10/y", "runs/2/x"]
    assert lake.keys("runs/1") == ["runs/10/x", "runs/10/y"]
    assert lake.keys("runs") == ["runs-old/1", "runs/10/x", "runs/10/y", "runs/2/x"]
    assert len(lake.keys("")) == 5
    assert lake.keys("nothing/here/") == []


def test_more_keys_than_one_listing_holds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    lake = Lake(f"s3://{bucket}")
    for n in range(8):
        lake.write(f"many/{n}", b"")
    assert lake.keys("many/") == [f"many/{n}" for n in range(8)]


class TestConditionalWrite:
    def test_the_first_wins(self, lake: Lake) -> None:
        lake.write("launch", b"first", only_if_absent=True)
        with pytest.raises(KeyExistsError, match=f"^{lake.url('launch')} exists already$"):
            lake.write("launch", b"second", only_if_absent=True)
        assert lake.read("launch") == b"first"

    def test_one_of_many_at_once_wins(self, tmp_path: Path) -> None:
        lake = Lake(f"file://{tmp_path}")
        ready, won = threading.Barrier(8), []

        def race(n: int) -> None:
            ready.wait()
            try:
                lake.write("launch", b"%d" % n, only_if_absent=True)
                won.append(b"%d" % n)
            except KeyExistsError:
                return

        threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [lake.read("launch")]
        assert lake.keys("") == ["launch"]


class TestTags:
    def test_travel_with_the_object(self, lake: Lake) -> None:
        tags = {"trained_date": "2025-06-01", "gpu": "NVIDIA A10G", "run": "manual__2025-06-01T00:00:00+00:00"}
        lake.write("models/v1/model.pt", b"x", tags=tags)
        assert lake.tags("models/v1/model.pt") == tags
        assert lake.keys("models/") == ["models/v1/model.pt"]

    def test_an_object_without_tags_has_none(self, lake: Lake) -> None:
        lake.write("a", b"x", tags={"gpu": "A10G"})
        lake.write("a", b"y")
        assert lake.tags("a") == {}

    def test_a_refused_write_changes_no_tags(self, lake: Lake) -> None:
        lake.write("a", b"x", tags={"gpu": "A10G"})
        with pytest.raises(KeyExistsError):
            lake.write("a", b"y", only_if_absent=True, tags={"gpu": "T4"})
        assert lake.tags("a") == {"gpu": "A10G"}


class TestJson:
    def test_equal_values_give_equal_bytes(self, lake: Lake) -> None:
        lake.write_json("a", {"x": 1, "y": [1.5, None]})
        lake.write_json("b", {"y": [1.5, None], "x": 1})
        assert lake.read("a") == lake.read("b")
        assert lake.read_json("a") == {"x": 1, "y": [1.5, None]}

    def test_nan_is_not_json(self, lake: Lake) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            lake.write_json("a", float("nan"))
        assert not lake.exists("a")

    def test_a_broken_object_is_named(self, lake: Lake) -> None:
        lake.write("a", b"{")
        with pytest.raises(LakeError, match=f"^{lake.url('a')} is not JSON"):
            lake.read_json("a")


class TestFrames:
    frame = pl.DataFrame(
        {"timestamp": [datetime(2025, 5, 5, 0, n, tzinfo=UTC) for n in range(3)], "close": [1.5, None, 3.5]},
        schema={"timestamp": pl.Datetime("us", "UTC"), "close": pl.Float64},
    )

    def test_keep_their_types_and_nulls(self, lake: Lake) -> None:
        lake.write_frame("f", self.frame)
        assert_frame_equal(lake.read_frame("f"), self.frame, check_exact=True)

    def test_an_empty_one_keeps_its_types(self, lake: Lake) -> None:
        lake.write_frame("f", self.frame.clear())
        assert lake.read_frame("f").schema == self.frame.schema

    def test_equal_frames_give_equal_bytes(self, lake: Lake) -> None:
        lake.write_frame("a", self.frame)
        lake.write_frame("b", pl.concat([self.frame.head(1), self.frame.tail(2)]).rechunk())
        assert lake.read("a") == lake.read("b")

    def test_a_broken_object_is_named(self, lake: Lake) -> None:
        lake.write("f", b"PAR1 and no more")
        with pytest.raises(LakeError, match=f"^{lake.url('f')} is not a readable parquet file"):
            lake.read_frame("f")


class TestDirectory:
    def test_a_failed_write_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lake = Lake(f"file://{tmp_path}")
        lake.write("a", b"whole")

        def no_space(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", no_space)
        with pytest.raises(LakeError, match=r"/a cannot be written: .*No space left on device; is the disk full"):
            lake.write("a", b"half")
        assert lake.read("a") == b"whole"
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "a"]

    def test_what_a_killed_write_left_is_no_key_and_goes_with_a_later_write(self, tmp_path: Path) -> None:
        lake = Lake(f"file://{tmp_path}")
        lake.write("a", b"whole")
        killed, under_way = (tmp_path / ".parts" / name for name in ("killed.part", "under_way.part"))
        for part in (killed, under_way):
            part.write_bytes(b"hal")
        os.utime(killed, (0, 0))
        assert lake.keys("") == ["a"]
        lake.write("b", b"whole")
        assert (killed.exists(), under_way.exists(), lake.keys("")) == (False, True, ["a", "b"])

    @pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../outside"])
    def test_no_key_leads_out(self, tmp_path: Path, key: str) -> None:
        lake = Lake(f"file://{tmp_path}/lake")
        for ask in (lambda: lake.write(key, b"x"), lambda: lake.read(key), lambda: lake.exists(key)):
            with pytest.raises(LakeError, match="leads out of"):
                ask()

    def test_the_root_of_the_machine_may_be_the_lake(self, tmp_path: Path) -> None:
        (tmp_path / "k").write_bytes(b"x")
        assert Lake("file:///").read(f"{tmp_path}/k"[1:]) == b"x"

    def test_spaces_in_the_address(self, tmp_path: Path) -> None:
        Lake(f"file://{tmp_path}/a%20lake").write("k", b"x")
        assert (tmp_path / "a lake" / "k").read_bytes() == b"x"


class TestBucket:
    def test_an_absent_bucket_is_not_an_empty_one(self, bucket: str) -> None:
        lake = Lake(f"s3://{bucket}-that-is-not-there/p")
        for ask in (lambda: lake.keys("k"), lambda: lake.read("k"), lambda: lake.write("k", b"")):
            with pytest.raises(
                LakeError, match=f"^s3://{bucket}-that-is-not-there/p/k: .*NoSuchBucket.*check CRPBOT_LAKE"
            ) as error:
                ask()
            assert not isinstance(error.value, KeyMissingError)


@pytest.mark.parametrize("url", ["", "/tmp/lake", "file://lake", "file:lake", "http://x/y", "s3://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(
        LakeError, match=f"CRPBOT_LAKE='{url}' is no address of a lake: expected s3://bucket/prefix or file:///directory"
    ):
        Lake(url)


def test_partitions_of_a_series_share_a_prefix() -> None:
    key = keys.candles("1m", "BTC-USD", date(2025, 5, 4))
    assert key == "raw/candles/1m/symbol=BTC-USD/date=2025-05-04/candles.parquet"
    assert keys.partitions(key) == "raw/candles/1m/symbol=BTC-USD/"
    assert keys.partitions(keys.coingecko("hourly", "bitcoin", date(2025, 5, 4))) == "raw/coingecko/hourly/coin=bitcoin/"
