"""The page: its numbers, its marks, what it leaves out, and that it needs nothing but itself."""

import base64
import io
import json
import re

import numpy as np
import pytest
from page_text import Page
from PIL import Image
from written_runs import SAMPLES, round_arrays, write_run

from covr_fast.errors import UserError
from covr_fast.reporting import context
from covr_fast.reporting.groups import read_study
from covr_fast.reporting.page import SECTIONS, page, write_page

COVR, OFF = [10, 12, 14, 40], [9, 11, 12, 8]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for seed, (covr, off) in enumerate(zip(COVR, OFF, strict=True)):
        write_run(folder / f"covr{seed}", covr, seed=seed, samples=True)
        write_run(folder / f"off{seed}", off, seed=seed, method="off")
    return page(read_study([folder]))


@pytest.fixture(scope="module")
def shown(html):
    return Page(html)


def page_of(*runs):
    return Page(page(read_study(runs)))


def row(table, label):
    (found,) = (row for row in table if row[0].startswith(label))
    return found


def test_every_section_is_there_in_order(html, shown):
    places = [html.index(f'<section id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    assert shown.values("a", "href") == [f"#{name}" for name in SECTIONS]


def test_nothing_is_loaded_from_elsewhere(html, shown):
    assert "http" not in html
    links = [
        v for _, name, v in shown.attributes if name in ("src", "href", "xlink:href", "srcset", "poster")
    ]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import", html)


def test_ids_are_unique_and_references_have_targets(html, shown):
    ids = [value for _, name, value in shown.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    referred = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert {a or b for a, b in referred} <= set(ids)


def test_every_picture_has_words(shown):
    assert len(shown.values("svg", "aria-label")) + len(shown.values("svg", "aria-hidden")) == len(
        shown.values("svg", "viewbox")
    )
    assert all(shown.values("svg", "aria-label"))
    assert all(shown.values("img", "alt"))
    assert len(shown.values("img", "alt")) == len(shown.values("img", "src"))


def test_the_head_says_what_was_run(shown):
    assert "8 finished runs in racetrack: fast · covr (4 seeds); fast · off (4 seeds)." in shown.texts[""]
    for fact in ("racetrack-v0", "covr, off", "nano", "0, 1, 2, 3", "3,000", "Z80, 2 cores", "torch 2.13.0"):
        assert fact in shown.texts[""]


def test_aggregates_are_those_calculated_by_hand(shown):
    (table,) = shown.tables["aggregates"]
    covr, off = row(table, "fast · covr"), row(table, "fast · off")
    value, low, high = map(float, re.findall(r"[\d.]+", covr[2]))
    assert value == 13.0  # the middle two of four
    assert 10 <= low <= value <= high <= 40
    assert covr[3].startswith("13.0 [")
    assert covr[4] == f"{np.mean(COVR):.1f} ± {np.std(COVR):.1f}"
    pairs = np.mean([(x > y) + 0.5 * (x == y) for x in COVR for y in OFF])
    assert covr[5].startswith(f"{pairs:.2f} [")
    assert off[5] == "base"
    assert "Base: fast · off." in shown.texts["aggregates"]
    assert "Only 4 seeds in the smallest group" in shown.texts["aggregates"]


def test_curves_end_where_the_evaluations_do(shown):
    (said,) = (text for text in shown.values("svg", "aria-label") if text.startswith("Learning curves"))
    assert f"fast · covr: {np.mean(COVR):.1f} at 3,000; fast · off: {np.mean(OFF):.1f} at 3,000" in said
    assert "Returns of evaluations; 4 seeds a group." in shown.texts["curves"]


def test_a_run_without_evaluations_in_training_shows_its_training_episodes(tmp_path):
    run = write_run(tmp_path / "a", 10)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "actor_mean" not in line))
    shown = page_of(run)
    assert "Returns of training episodes; 1 seed a group." in shown.texts["curves"]
    assert "Groups of one seed have no interval" in shown.texts["aggregates"]
    assert row(shown.tables["aggregates"][0], "fast · covr")[2:4] == ["10.0", "10.0"]


def test_the_vlm_that_decides_has_a_curve_and_one_that_is_not_trained_a_level(tmp_path):
    policy = write_run(tmp_path / "vpf", 16, method="vpf")
    alone = write_run(tmp_path / "vbe", 3, method="vbe")
    (alone / "metrics.jsonl").write_text('{"step": 0, "seconds": 1.0, "eval/vlm_before_mean": 3.0}\n')
    html = page(read_study([policy, alone]))
    (said,) = (t for t in Page(html).values("svg", "aria-label") if t.startswith("Learning curves"))
    assert "vpf: 4.00 at 3,000" in said, "the curve ends where the VLM's last evaluation does"
    assert "vbe, not trained" in html


def test_rounds_of_the_filter(html, shown):
    labels = shown.values("svg", "aria-label")
    assert any(text.startswith("threshold τ, racetrack. fast · covr: 1.50, 2.50") for text in labels)
    assert any("kept share, racetrack. fast · covr: 0.25, 0.25" in text for text in labels)
    assert "4 seeds a group, with 95 % intervals." in shown.texts["filter"]
    assert any("kept share by quarter, racetrack. fast · covr: 0.50, 0.25, 0.17, 0.12" in t for t in labels)
    assert f"round 1: {SAMPLES // 4} of {SAMPLES} above" in html
    assert html.count("<details open>") == 1
    assert html.count("the samples of each round") == len(COVR)


def words_in(html, title):
    """The texts of the charts with this title."""
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    texts = [re.findall(r"<text[^>]*>([^<]*)</text>", chart) for chart in charts]
    return [set(words) for words in texts if title in words]


def test_samples_are_named_after_what_filters_and_weighs_them(tmp_path):
    write_run(tmp_path / "covr", 10, samples=True)
    write_run(tmp_path / "q", 10, method="m7", samples=True, covr__score="q")
    html = page(read_study([tmp_path]))
    assert len(words_in(html, "returns of D_f")) == len(words_in(html, "Q values of D_f")) == 1
    returns, q = words_in(html, "cutoff")  # of different units, so not in one chart
    assert "returns" in returns - q
    assert "Q values" in q - returns
    (tau,) = words_in(html, "threshold τ")
    assert "z-scores" in tau
    assert re.search(r"A frame that was kept: Q value [\d.]+, decision \d+, weight", html)
    assert "Other rules: fast · m7 goes by Q values instead of returns." in Page(html).texts["filter"]


def test_no_z_scores_means_that_the_threshold_is_in_the_units_of_the_score(tmp_path):
    write_run(tmp_path / "m5", 10, method="m5", covr__z_score=False)
    write_run(tmp_path / "m6", 10, method="m6", covr__score="reward", covr__entropy="mean")
    html = page(read_study([tmp_path]))
    plain, z = words_in(html, "threshold τ")
    assert "returns" in plain
    assert "z-scores" in z
    assert "rewards" in set.union(*words_in(html, "cutoff"))
    (nats,) = (words for words in words_in(html, "policy entropy") if "nats" in words)
    (per_number,) = (w for w in words_in(html, "policy entropy") if "nats per number of an action" in w)
    assert nats != per_number


@pytest.mark.parametrize("weights, axis", [("random", "random weight"), ("equal", "equal weight")])
def test_random_filters_and_other_weights_are_called_so(weights, axis, tmp_path):
    write_run(tmp_path / "a", 10, method="m1", samples=True, covr__filter="random", covr__weights=weights)
    html = page(read_study([tmp_path]))
    text = Page(html).texts["filter"]
    (words,) = words_in(html, "weights above 0")
    assert axis in words
    assert "Dashed: the threshold of Eq. 5, which only says how many are kept, at random." in text
    assert f"round 1: {SAMPLES // 4} of {SAMPLES} at random" in html
    assert "Of fast · m1 it only says how many are kept." in text
    assert "fast · m1 keeps random samples, as many as EDDF would and weights" in text
    assert "that EDDF kept" not in text
    assert "RALW’s weight" not in words


def test_a_top_share_is_no_threshold_of_eq_5(tmp_path):
    write_run(tmp_path / "a", 10, method="m2", samples=True, covr__filter="top", covr__top_share=0.8)
    text = page_of(tmp_path).texts["filter"]
    assert "Dashed: the least return of the top 80 %." in text
    assert "Other rules: fast · m2 keeps the top 80 %." in text


def test_captions_claim_no_interval_that_is_not_there(tmp_path):
    write_run(tmp_path / "a", -18.4)
    shown = page_of(tmp_path)
    for section in ("filter", "priors", "vlm"):
        assert "1 seed a group." in shown.texts[section]
        assert "95 % intervals" not in shown.texts[section]
    assert "Bars:" not in shown.texts["aggregates"]
    assert row(shown.tables["aggregates"][0], "fast · covr")[4] == "\N{MINUS SIGN}18.4"
    write_run(tmp_path / "b", 10, seed=1)
    write_run(tmp_path / "c", 10, method="m1")
    text = page_of(tmp_path).texts["filter"]
    assert "1 to 2 seeds a group, with 95 % intervals where there are several." in text


def test_a_run_too_short_for_a_curve_is_a_point_and_counts_as_trained(tmp_path):
    run = write_run(tmp_path / "short", 7, steps=400)
    lines = [json.dumps({"step": 0, "eval/random_mean": 2}), json.dumps({"step": 400, "eval/actor_mean": 7})]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = page(read_study([tmp_path]))
    assert "Learning curves in racetrack. fast · covr: 7.00 at 400" in html
    assert "not trained" not in html
    assert "Returns of evaluations" in page_of(tmp_path).texts["curves"]


def test_frames_are_those_of_the_first_seed_with_their_returns(shown):
    arrays = round_arrays(1, seed=0)
    sources = [source for source in shown.values("img", "src") if source.startswith("data:image/png")]
    assert len(sources) == 2 * 4  # two rounds of four frames
    for source, frame in zip(sources, arrays["frames"], strict=False):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        assert np.array_equal(picture.transpose(2, 0, 1), frame)
    said = [text for text in shown.values("img", "alt") if text.startswith("A frame")]
    first = arrays["returns"][arrays["frame_at"][0]]
    weight = arrays["weights"][0]
    time = arrays["time"][arrays["frame_at"][0]]
    assert said[0] == f"A frame that was kept: return {first:.2f}, decision {time}, weight {weight:.2f}"
    assert [text.split(":")[0] for text in said[:4]] == ["A frame that was kept"] * 2 + [
        "A frame that was dropped"
    ] * 2


def test_the_vlm_by_round(shown):
    (said,) = (text for text in shown.values("svg", "aria-label") if text.startswith("Return of the VLM"))
    before = np.mean(COVR) / 8
    assert f"fast · covr: {before:.2f}, {before + 1:.2f}, {before + 2:.2f}" in said
    assert "published" not in shown.texts["vlm"]


def test_throughput_and_runs(shown):
    (table,) = shown.tables["speed"]
    covr = row(table, "fast · covr")
    assert covr[2] == f"{np.mean([3000 / (120 + seed) for seed in range(4)]):.1f}"
    assert covr[4:6] == ["50%", "25%"]
    runs = shown.tables["runs"][0]
    assert len(runs) == 1 + len(COVR) + len(OFF)
    deviation = np.std([-1, 0, 1])
    assert runs[1][1:4] == ["fast · covr", "0", f"10.0 ± {deviation:.1f}"]
    assert "covr-fast train racetrack" in shown.texts["runs"]
    assert "--seed=3" in shown.texts["runs"]


def test_videos_are_on_the_page_as_long_as_there_is_room(shown, tmp_path, monkeypatch):
    (video,) = (source for source in shown.values("img", "src") if source.startswith("data:image/gif"))
    assert Image.open(io.BytesIO(base64.b64decode(video.partition(",")[2]))).size == (8, 8)
    run = write_run(tmp_path / "a", 10, samples=True)
    (run / "episode.mp4").write_bytes(b"\0" * 1000)
    assert page_of(run).values("video", "src") == [
        f"data:video/mp4;base64,{base64.b64encode(bytes(1000)).decode()}"
    ]
    monkeypatch.setattr(context, "VIDEOS", 1000)
    monkeypatch.setattr(context, "PICTURES", 1000)
    shown = page_of(run)
    assert shown.values("video", "src") == shown.values("img", "src") == []
    assert "episode.mp4 (0.0 MB) is left out" in shown.texts["videos"]
    assert "the page has no room for them" in shown.texts["filter"]


def test_the_papers_table_with_our_column(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"rad{seed}", 500 + 100 * seed, seed=seed, preset="cartpole-swingup", kind="rad",
                  method="off", steps=100_000, episodes=10)  # fmt: skip
    write_run(tmp_path / "covr", 320, preset="cartpole-swingup", kind="rad", steps=40_000)
    write_run(tmp_path / "fast", 300, preset="cartpole-swingup", kind="fast", steps=100_000)
    shown = page_of(tmp_path)
    (table,) = shown.tables["published"]
    assert len(table) == 1 + 13 + 1
    assert row(table, "RADrad")[1:] == ["694 ± 28", "600 ± 82 (3 seeds)", ""]
    covr = row(table, "RAD + COVR")
    assert covr[1:3] == ["872 ± 2", "320 (1 seed)"]
    for difference in (
        "40,000 steps, not 100,000",
        "the VLM is nano",
        "1 seed, not 3",
        "3 evaluation episodes",
    ):
        assert difference in covr[3]
    assert row(table, "CURL")[1:] == ["582 ± 146", "not run", "not a method of covr_fast"]
    assert row(table, "DrQ")[1:] == ["759 ± 92", "not run", ""]
    assert row(table, "fast · covr")[1:] == ["-", "300 (1 seed)", "the paper has no such row"]
    assert "published" in shown.texts["curves"]


PAPERS_VLM = "Qwen/Qwen2.5-VL-3B-Instruct"


def remarks_of(folder, preset="cartpole-swingup", **settings):
    """What the page remarks of a run with the paper's VLM, budget and evaluations, but for its one seed."""
    run = {"kind": "rad", "model": PAPERS_VLM, "steps": 100_000, "episodes": 10} | settings
    write_run(folder, 300, preset=preset, **run)
    (table,) = page_of(folder).tables["published"]
    (remarks,) = (cells[3] for cells in table[1:] if "1 seed" in cells[2])
    return remarks.removeprefix("1 seed, not 3").removeprefix("; ")


def test_settings_that_are_not_the_presets_are_remarked(tmp_path):
    few = {"decisions_per_update": 50, "warmup": 320}
    assert remarks_of(tmp_path / "a", **few) == (
        "settings differ from the preset’s: warmup=320, decisions_per_update=50"
    )
    more = few | {"env__action_repeat": 2, "replay__batch_size": 64, "agent__hidden": 32}
    assert remarks_of(tmp_path / "b", **more) == (
        "settings differ from the preset’s: "
        "warmup=320, decisions_per_update=50, env.action_repeat=2 (+2 more)"
    )
    # begun from no preset: it is the task's that counts
    assert "decisions_per_update=50" in remarks_of(tmp_path / "c", begun_as="", decisions_per_update=50)


def test_settings_that_change_no_outcome_are_not_remarked(tmp_path):
    for name, settings in {
        "pace": {"log_every": 7, "video": False, "device": "cuda:1", "threads": 3, "seed": 5},
        "evaluations": {"eval__every": 7, "eval__vlm": False, "eval__rounds": True},
        "memory": {"tuner__micro_batch": 2, "tuner__gradient_checkpointing": True},
        "no VLM": {"method": "off", "covr__psi_0": 9, "tuner__epochs": 9, "agent__prior_weight": 9.0},
        "frozen": {"method": "dpl", "covr__psi_0": 9, "tuner__epochs": 9},
        "evaluated": {"method": "vbe", "warmup": 9, "replay__batch_size": 9, "agent__hidden": 9},
    }.items():
        assert "settings" not in remarks_of(tmp_path / name, **settings)
    assert "covr.vlm=tuned" in remarks_of(tmp_path / "tuned", method="off", covr__vlm="tuned")
    assert "agent.prior_weight=9.0" in remarks_of(tmp_path / "prior", method="dpl", agent__prior_weight=9.0)
    assert "tuner.epochs=9" in remarks_of(tmp_path / "epochs", tuner__epochs=9)


def test_the_rows_of_the_sweep_for_a_table_are_as_good_as_the_presets(tmp_path):
    table = {"replay__augment": "translate", "replay__pad": 4, "replay__batch_size": 512}
    assert remarks_of(tmp_path / "a", **table) == ""
    assert remarks_of(tmp_path / "b", **table, replay__gamma=0.5) == (
        "settings differ from those of the sweep dmcontrol: replay.gamma=0.5"
    )
    # the sweep's Walker has crops
    assert "replay.augment=translate" in remarks_of(tmp_path / "c", "walker-walk", **table)


def test_a_run_without_settings_says_so(tmp_path):
    run = write_run(tmp_path / "a", 100, preset="hopper-hop", model=PAPERS_VLM)
    (run / "config.json").unlink()
    remarks = row(page_of(run).tables["published"][0], "COVR")[3]
    assert "its settings are not known: it has no config.json" in remarks
    assert "settings differ" not in remarks


def test_the_published_curve_of_the_vlm_is_on_carlas_highway_alone(tmp_path):
    write_run(tmp_path / "a", 100, preset="carla-highway", model="Qwen/Qwen2.5-VL-3B-Instruct", steps=100_000)
    write_run(tmp_path / "b", 100, preset="carla-pedestrians", steps=100_000)
    shown = page_of(tmp_path)
    assert shown.texts["vlm"].count("published, \N{MINUS SIGN}13 after 0, 97 after 5") == 1
    remarks = row(shown.tables["published"][0], "COVR")[3]
    assert "the agent is rad, and the paper’s is not known here" in remarks
    assert "VLM" not in remarks
    assert row(shown.tables["published"][0], "VLM alone (VBE)")[1] == "\N{MINUS SIGN}11"


def test_figures_over_tasks_need_a_group_in_every_task(tmp_path):
    for seed, (cartpole, walker) in enumerate([(100, 300), (200, 500)]):
        for method in ("covr", "off"):
            add = 100 if method == "covr" else 0
            write_run(
                tmp_path / f"c-{method}{seed}",
                cartpole + add,
                seed=seed,
                preset="cartpole-swingup",
                method=method,
            )
            write_run(
                tmp_path / f"w-{method}{seed}", walker + add, seed=seed, preset="walker-walk", method=method
            )
    write_run(tmp_path / "w-dpl", 900, preset="walker-walk", method="dpl")
    write_run(tmp_path / "w-covr2", 900, seed=2, preset="walker-walk")
    shown = page_of(tmp_path)
    table = shown.tables["aggregates"][-1]
    assert [cells[0] for cells in table[1:]] == ["rad · covr", "rad · off"]
    covr = row(table, "rad · covr")
    assert covr[1] == "2"  # the third seed has no run in the other task
    assert covr[4].startswith("0.38 [")
    assert covr[5].startswith(f"{np.mean([(3 / 4 + 0.5 / 4), 3 / 4]):.2f} [")


def test_other_tasks_are_scaled_from_the_random_policy_to_the_best_group(tmp_path):
    for preset, top in (("racetrack", 40), ("highway", 20)):
        write_run(tmp_path / f"{preset}1", top, preset=preset, random=10)
        write_run(tmp_path / f"{preset}2", (top + 10) / 2, preset=preset, random=10, method="off")
    table = page_of(tmp_path).tables["aggregates"][-1]
    assert [cells[2] for cells in table[1:]] == ["1.00", "0.50"]


def test_tasks_without_a_common_group(tmp_path):
    write_run(tmp_path / "a", 10)
    write_run(tmp_path / "b", 10, preset="highway", method="off")
    assert "No group was run in every task" in page_of(tmp_path).texts["aggregates"]


def test_runs_without_an_agent_or_a_vlm(tmp_path):
    write_run(tmp_path / "vbe", 7, method="vbe", steps=0)
    write_run(tmp_path / "vpf", 8, method="vpf")
    write_run(tmp_path / "off", 9, method="off")
    shown = page_of(tmp_path)
    table = shown.tables["aggregates"][0]
    assert [row(table, label)[2] for label in ("vbe", "vpf", "fast · off")] == ["7.00", "8.00", "9.00"]
    assert row(shown.tables["runs"][0], str(tmp_path / "off"))[4:6] == ["-", "-"]
    assert row(shown.tables["runs"][0], str(tmp_path / "vbe"))[3] == "-"


def test_what_is_missing_is_a_dash_and_a_line(tmp_path):
    run = write_run(tmp_path / "old", 10)
    summary = json.loads((run / "summary.json").read_text())
    for name in ("time_shares", "seconds", "steps_per_second", "rounds", "device"):
        del summary[name]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").unlink()
    shown = page_of(run)
    assert "time_shares in summary.json is missing in" in shown.texts[""]
    assert "metrics.jsonl is missing in" in shown.texts[""]
    assert row(shown.tables["speed"][0], "fast · covr")[2:] == ["-"] * 11
    assert row(shown.tables["runs"][0], str(run))[-2:] == ["-", "-"]
    for section in ("filter", "vlm", "priors"):
        assert "No run" in shown.texts[section]


def test_versions_of_all_runs_are_named_and_what_older_runs_do_not_say(tmp_path):
    for seed, change in enumerate(({}, {"torch": "2.14.0"}, None)):
        run = write_run(tmp_path / str(seed), 10, seed=seed)
        summary = json.loads((run / "summary.json").read_text())
        if change is None:  # of a version that did not write them
            del summary["versions"], summary["machine"]
        else:
            summary["versions"] |= change
        (run / "summary.json").write_text(json.dumps(summary))
    said = page_of(tmp_path).texts[""]
    assert "covr-fast 0.1.0, torch 2.13.0 and 2.14.0, not recorded in 1 of 3 runs" in said
    assert "Z80, 2 cores, cpu" in said  # the older run's device


def test_a_damaged_file_of_a_round_is_a_line(tmp_path):
    run = write_run(tmp_path / "a", 10, samples=True)
    arrays = round_arrays(1, 0)
    np.savez(run / "rounds/round-1.npz", **arrays | {"weights": arrays["weights"][1:]})
    (run / "rounds/round-2.npz").write_bytes(b"PK")
    np.savez(run / "rounds/round-3.npz", **arrays | {"frame_at": arrays["frame_at"] + 1000})
    text = page_of(run).texts["filter"]
    for number in (1, 2, 3):
        assert f"round-{number}.npz cannot be read" in text


def test_only_unfinished_runs(tmp_path):
    run = write_run(tmp_path / "a", 10)
    (run / "summary.json").unlink()
    shown = page_of(run)
    assert "is not finished: 3000 of 3000 steps" in shown.texts[""]
    assert row(shown.tables["runs"][0], str(run))[1] == "not finished"
    assert list(shown.texts) == ["", *SECTIONS]


def test_names_are_text_and_never_html(tmp_path):
    run = write_run(
        tmp_path / "<b>a&b", 10, vlm__prompt="</script><script>alert(1)</script>", begun_as="<i>&amp;"
    )
    shown = page_of(run)
    assert "<b>a&b" in shown.texts["runs"]
    assert "<i>&amp;" in shown.texts[""]
    assert not any(element in ("b", "i", "script") for element, _, _ in shown.attributes)


def test_the_file_is_whole_or_as_before(tmp_path, monkeypatch):
    study = read_study([write_run(tmp_path / "a", 10)])
    out = tmp_path / "out.html"
    assert write_page(study, out) == len(out.read_bytes())
    assert f"This page has {len(out.read_bytes()) / 1e6:.1f} MB" in out.read_text()
    before = out.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device: the page was not written"):
        write_page(study, out)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out.html"}
