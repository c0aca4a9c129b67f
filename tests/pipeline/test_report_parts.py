"""What a report is made of: curves, charts, the codes that pictures share, and runs as they stand on a disk."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import made_report
import numpy as np
import pytest
import tiny_set
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import InputError, VerificationFailed
from manifests.reader import open_manifest
from manifests.rows import find_places, read_rows, source_of
from manifests.schema import FeaturesSpec, SourceIdentity
from manifests.storage import Store
from pipeline.report import page as pages
from pipeline.report.build import MOST_IMAGES, run_page, set_page, write_report
from pipeline.report.chart import POINTS, Series, draw_chart, round_numbers, spread, thinned
from pipeline.report.colours import TILE, code_colours, code_map, draw_sheet
from pipeline.report.curves import comparison_charts, job_throughput, phase_charts
from pipeline.report.gallery import choose_images, read_cards
from pipeline.report.meaning import draw_patches, find_meanings
from pipeline.report.runs import read_run

finite = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.fixture(scope="module")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    made_report.save_set(folder / "tokens", folder / "images", 150)
    return folder / "tokens"


# --- colours ----------------------------------------------------------------------------------------------------------


def test_a_code_has_one_colour_and_like_vectors_like_colours() -> None:
    line = np.linspace(0, 1, 50)[:, None] * np.ones((1, 6))
    colours = code_colours(line.astype(np.float32))
    assert len(np.unique(colours[:, 0])) == 50
    assert np.abs(np.diff(colours[:, 0].astype(int))).max() <= 6
    assert code_colours(np.zeros((2, 1), np.float32)).shape == (2, 3)
    large = np.random.default_rng(0).standard_normal((9000, 5)).astype(np.float32)
    assert code_colours(large).max() == 255
    drawn = np.asarray(code_map(np.array([[0, 7], [7, 0]]), colours))
    half = TILE // 2
    np.testing.assert_array_equal(drawn[:half, half:], np.broadcast_to(colours[7], (half, half, 3)))
    np.testing.assert_array_equal(drawn[half:, half:], drawn[:half, :half])


def test_the_sheet_has_a_line_for_each_view() -> None:
    colours = [np.zeros((4, 3), np.uint8)] * 3
    one, two = (draw_sheet(np.zeros((n, 8, 8, 3), np.uint8), np.zeros((n, 2, 2, 3), int), colours) for n in (1, 2))
    assert two.size[0] == one.size[0]
    assert two.size[1] - one.size[1] > TILE


# --- charts -----------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=1, max_size=9), st.floats(0.1, 20))
def test_names_of_lines_do_not_stand_on_each_other(wanted: list[float], step: float) -> None:
    low, high = min(wanted), max(wanted) + 100
    placed = spread(wanted, step, low, high)
    room = min(step, (high - low) / max(1, len(wanted) - 1))
    ordered = sorted(placed)
    assert all(b - a >= room - 1e-6 * max(1, abs(a)) for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= low - 1e-6 * abs(low) - 1e-6
    assert ordered[-1] <= high + 1e-6
    by_wish = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert [placed[i] for i in by_wish] == ordered, "in the order of the lines"


@given(finite, st.floats(1e-6, 1e6), st.integers(3, 9))
def test_ticks_are_few_and_enclose_the_values(low: float, width: float, count: int) -> None:
    high = low + width
    marks = round_numbers(low, high, count)
    assert marks[0] <= low + 1e-6 * width + 1e-9 * abs(low)
    assert marks[-1] >= high - 1e-6 * width - 1e-9 * abs(high)
    assert len(marks) <= 2 * count + 2


def test_long_lines_are_averaged_and_what_is_no_number_is_left_out() -> None:
    long = thinned(Series("x", range(1000), [float(n) for n in range(1000)]))
    assert len(long.x) <= POINTS
    assert long.y[0] == np.mean(range(7))
    assert draw_chart("t", [Series("x", [1, 2], [math.nan, math.inf])], x_name="x", y_name="y") is None
    chart = draw_chart("t", [Series("a", [1, 2, 3], [1, math.nan, 3]), Series("b", [2], [5])], x_name="x", y_name="y")
    assert chart is not None
    assert chart.rows == [["1", "1", "-"], ["2", "1", "5"], ["3", "3", "5"]]
    assert "nan" not in "".join(line.path for line in chart.lines).lower()
    assert len(chart.lines[1].dots) == 1, "a single point is drawn as one"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_as_the_trainer_leaves_it(tmp_path: Path, token_set: Path) -> None:
    run = read_run(made_report.save_run(tmp_path / "run", token_set))
    assert [(one.name, len(one.steps), one.finished) for one in run.phases] == [("pretrain", 400, True), ("instruct", 90, False)]  # fmt: skip
    assert run.token_sets == [str(token_set)]
    (tmp_path / "run" / "config.json").write_text(json.dumps({"phases": [{"objective": {"manifests": ["launched"]}}]}))
    assert read_run(tmp_path / "run").token_sets == ["launched", str(token_set)], "before there is a checkpoint too"
    (tmp_path / "run" / "config.json").unlink()
    titles = [chart.title for chart in phase_charts(run.phases[0])]
    assert titles == ["Loss", "codes: loss by depth", "codes: code accuracy by depth"]
    by_depth = phase_charts(run.phases[0])[1]
    assert [line.name for line in by_depth.lines] == ["depth 0", "depth 1", "depth 2"]
    assert float(by_depth.rows[-1][1]) == pytest.approx(3.0, abs=0.2)
    other = read_run(made_report.save_run(tmp_path / "other", token_set, seed=5))
    compared = comparison_charts(run, other)
    assert [name for name, _ in compared] == ["pretrain", "instruct"]
    assert [line.name for line in compared[0][1][0].lines] == ["run", "other"]


def test_validation_records_stand_beside_the_steps(tmp_path: Path, token_set: Path) -> None:
    folder = made_report.save_run(tmp_path / "run", token_set)
    term = {"loss": 4.0, "loss_depth": [3.0, 4.0, 5.0], "accuracy_depth": [0.3, 0.2, 0.1], "targets": 1}
    record = {"kind": "validation", "step": 200, "loss": 5.25, "text_loss": 1.25, "objectives": {"codes": term}}
    metrics = folder / "pretrain" / "metrics.jsonl"
    later = {"kind": "something else", "step": 201}
    metrics.write_text(metrics.read_text().rpartition("\n")[0] + f"\n{json.dumps(record)}\n{json.dumps(later)}\n")
    run = read_run(folder)
    assert len(run.phases[0].steps) == 400
    charts = phase_charts(run.phases[0])
    assert {"text val.", "codes val."} <= {line.name for line in charts[0].lines}
    assert "depth 2 val." in [line.name for line in charts[2].lines]
    (marked,) = [line for line in charts[0].lines if line.name == "text val."]
    assert len(marked.dots) == 1
    (text_loss, *_) = comparison_charts(run, read_run(made_report.save_run(tmp_path / "other", token_set)))[0][1]
    assert [line.name for line in text_loss.lines] == ["run", "other", "run val."]


def test_what_was_measured_of_two_runs_stands_side_by_side(
    tmp_path: Path, token_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(open_manifest(token_set).manifest.source.location)
    monkeypatch.chdir(root)
    asked = [{"image": name, "question": "what?", "expected": "a", "answer": "a", "correct": True}
             for name in (str(root / "shapes/0001.png"), "shapes/0002.png", "not/there.png")]  # fmt: skip
    runs = [made_report.save_run(tmp_path / name, token_set, seed=n, answers=asked) for n, name in enumerate("ab")]
    asked[0]["correct"] = False
    (runs[1] / "eval" / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked[::-1]))
    for number, run in enumerate(runs):
        term = {"loss": 2.5 + number, "loss_depth": [2.0, 3.0], "accuracy_depth": [0.5, 0.25]}
        losses = {"loss": 4.0, "text_loss": 1.5, "objectives": {"codes": term}}
        (run / "eval" / "results.json").write_text(json.dumps({"losses": losses, "accuracy": 1.0}))
    page = run_page(read_run(runs[0]), read_run(runs[1]), 8)
    assert page.held_out is not None
    assert page.held_out.names == ["a", "b"]
    assert dict(page.held_out.rows)["codes: loss"] == [2.5, 3.5]
    assert dict(page.held_out.rows)["codes: code accuracy, depth 1"] == [0.25, 0.25]
    assert page.answers is not None
    assert page.answers.scores == [(3, 3), (2, 3)]
    assert page.answers.differing == 1
    assert page.answers.rows[0].said == [("a", True), ("a", False)], "first what one run alone has right"
    assert [row.picture is not None for row in page.answers.rows] == [True, True, False]
    assert "Held-out losses" in pages.render(page)


def test_a_damaged_run_is_one_sentence(tmp_path: Path, token_set: Path) -> None:
    with pytest.raises(InputError, match="no training run"):
        read_run(tmp_path)
    folder = made_report.save_run(tmp_path / "run", token_set)
    metrics = folder / "instruct" / "metrics.jsonl"
    metrics.write_text("[]\n" + metrics.read_text())
    with pytest.raises(VerificationFailed, match=r"line 1 of .*metrics\.jsonl"):
        read_run(folder)


def test_pauses_are_cut_out_of_the_throughput(token_set: Path) -> None:
    found = job_throughput(Store.open(token_set))
    assert found is not None
    assert (found.units, found.images, found.pauses) == (20, sum(640 + 10 * n for n in range(20)), 1)
    assert found.working == pytest.approx(200)
    rate = found.charts[0]
    values = [float(row[1]) for row in rate.rows]
    assert values[0] == pytest.approx(65, abs=2)
    assert values[-1] == pytest.approx(83, abs=1)
    assert {float(row[1]) for row in found.charts[1].rows} == {0.1}


# --- images and codes -------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_images_asked_for(token_set: Path) -> None:
    opened = open_manifest(token_set)
    ids = opened.index()["image_id"].to_pylist()
    asked = [ids[149], ids[0], ids[70], ids[0]]
    rows = read_rows(opened, find_places(opened, asked))
    assert [row.values["image_id"][0].as_py() for row in rows] == asked
    assert [(row.shard.unit, row.row) for row in rows] == [("u000002", 21), ("u000000", 0), ("u000001", 6), ("u000000", 0)]  # fmt: skip
    with pytest.raises(KeyError):
        find_places(opened, ["nothing"])


def test_the_source_of_a_unit_is_found_through_merges_and_filters() -> None:
    plain = {"kind": "folder", "location": "/a", "settings": {}}
    table = {"kind": "parquet", "location": "/b", "settings": {"image_column": "jpg"}}
    filtered = {"kind": "filter", "location": "/b", "settings": {"source": table}}
    merged = SourceIdentity(kind="merge", location="several", settings={"sources": [plain, filtered]})
    assert source_of(merged, "0.u000000").root == "/a"
    found = source_of(merged, "1.u000003")
    assert (found.root, found.column) == ("/b", "jpg")


def test_the_images_asked_about_come_first(token_set: Path) -> None:
    opened = open_manifest(token_set)
    chosen = choose_images(opened, 10, ["shapes/0100.png", "not there", "shapes/0003.png"])
    assert chosen[:2] == ["shapes/0100.png", "shapes/0003.png"]
    assert len(set(chosen)) == 10
    assert len(choose_images(opened, 1000)) == 150


def test_patches_shown_for_a_code_have_it(token_set: Path) -> None:
    opened = open_manifest(token_set)
    cards = read_cards(opened, choose_images(opened, 60))
    for depth, size in enumerate(made_report.SIZES):
        found = find_meanings(cards, depth, size)
        assert found
        for one in found:
            holders = [card for card in cards if (card.codes_PD[card.shows_picture_P, depth] == one.code).any()]
            assert len(holders) == one.pictures >= 3
            assert len({number for number, _ in one.shown}) == len(one.shown)
            for number, position in one.shown:
                assert cards[number].codes_PD[position, depth] == one.code
                assert cards[number].shows_picture_P[position], "a padding cell shows nothing"
        assert draw_patches(cards, found[0], made_report.GRID).shape == (64, 64 * len(found[0].shown), 3)


def test_a_picture_that_changed_or_is_gone_leaves_its_reason(tmp_path: Path) -> None:
    made_report.save_set(tmp_path / "tokens", tmp_path / "images", 6)
    (tmp_path / "images" / "shapes" / "0001.png").unlink()
    (tmp_path / "images" / "shapes" / "0002.png").write_bytes(made_report._png(made_report.picture(9)))
    opened = open_manifest(tmp_path / "tokens")
    cards = {card.image_id: card for card in read_cards(opened, choose_images(opened, 6))}
    assert "there is no file" in cards["shapes/0001.png"].problem
    assert "has changed since" in cards["shapes/0002.png"].problem
    assert cards["shapes/0000.png"].picture is not None
    html = pages.render(set_page(opened, 6))
    assert html.count("No picture: ") == 2


def test_the_gallery_is_bounded_and_says_what_it_left_out(token_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "GALLERY_BYTES", 100_000)
    html = pages.render(set_page(open_manifest(token_set), MOST_IMAGES))
    shown = html.count('<li class="card"')
    assert 5 < shown < 60
    assert f"{150 - shown} more were left out" in html
    assert len(html) < 500_000


def test_a_set_of_features_has_pictures_and_no_codes(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 6)
    spec = FeaturesSpec(kind="features", origin="tiny", weights_sha256={}, view_size=28, grid=(4, 4), width=5, dtype="float32")  # fmt: skip
    values = np.zeros((6, 16, 5), np.float32)
    tiny_set.save_features(tmp_path / "tokens", tmp_path / "images", ids, spec, values)
    html = pages.render(set_page(open_manifest(tmp_path / "tokens"), 6))
    assert html.count("data:image/webp") == 6
    assert "data-codes" not in html
    assert "Codebook use" not in html


def test_a_set_in_a_bucket_gets_its_page_there(s3: str, tmp_path: Path) -> None:
    made_report.save_set(f"{s3}/tokens", tmp_path / "images", 6)
    place = write_report(f"{s3}/tokens", images=6)
    assert place == f"{s3}/tokens/report.html"
    html = Store.open(f"{s3}/tokens").read("report.html").decode()
    assert html.count("data-codes") == 6
    write_report(f"{s3}/tokens", images=2, to=tmp_path / "here.html")
    assert (tmp_path / "here.html").read_text().count("data-codes") == 2


def test_two_token_sets_cannot_be_put_side_by_side(token_set: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only runs"):
        write_report(str(token_set), images=3, other=str(token_set))
    with pytest.raises(InputError, match="no manifest"):
        write_report(str(tmp_path), images=3)
