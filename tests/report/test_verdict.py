"""The verdict says what the numbers say, also when the search lost."""

from nas.report.verdict import verdict


def network(role, worst, natural=0.98, *, name=None, half=0.01, parameters=1000, **more):
    return {
        "name": name or role,
        "role": role,
        "parameters": parameters,
        "nonzero": parameters,
        "n": 1000,
        "natural": natural,
        "worst_case": worst,
        "interval": [worst - half, worst + half],
        "attacks": {"pgd": worst},
        **more,
    }


def lines_of(*models):
    return verdict({"models": list(models)})


def test_a_clear_win():
    line = lines_of(network("searched", 0.90), network("random", 0.80), network("random", 0.84))[0]
    assert line.startswith("The searched network is more robust than 2 random cells of equal size")
    assert "mean of 82.0% (lowest 80.0%, highest 84.0%)" in line
    assert "8.0 points higher (beyond the 95% intervals)" in line


def test_a_clear_loss_is_as_plain():
    line = lines_of(network("searched", 0.70, 0.90), network("random", 0.80), network("random", 0.84))[0]
    assert line.startswith("The searched network is less robust than 2 random cells of equal size")
    assert "12.0 points lower (beyond the 95% intervals)" in line
    assert "Natural accuracy 90.0% against 98.0%" in line
    assert "8.0 points lower (beyond the 95% intervals)" in line


def test_overlapping_intervals_are_noise_in_either_direction():
    for worst in (0.805, 0.795):
        line = lines_of(network("searched", worst), network("random", 0.80), network("plain", 0.80))[0]
        assert line.startswith("The searched network is not measurably more or less robust than 1 random cell")
        assert "0.5 points" in line
        assert "(within noise)" in line


def test_the_border_between_noise_and_difference():
    """Intervals [0.79, 0.81] and [0.81, 0.83] touch; a hair further they do not."""
    plain = network("plain", 0.80)
    assert "within noise" in lines_of(network("searched", 0.82), plain)[1]
    assert "beyond the 95% intervals" in lines_of(network("searched", 0.8201), plain)[1]


def test_plain_baseline_that_wins():
    line = lines_of(network("searched", 0.80), network("plain", 0.90, 0.99, parameters=2000))[1]
    assert line.startswith("The searched network is less robust than the plain baseline (2.00 times its parameters)")
    assert "10.0 points lower" in line


def test_cost_of_compression():
    line = lines_of(network("searched", 0.90), network("compressed", 0.85, 0.97, nonzero=250))[2]
    assert "keeps 250 of 1,000 parameters (25.0%)" in line
    assert "worst case 85.0% [84.0, 86.0] against 90.0% before, 5.0 points lower (beyond the 95% intervals)" in line


def test_what_was_not_run_is_said():
    random_line, plain_line = lines_of(network("searched", 0.9))
    assert random_line.startswith("No random cells were evaluated")
    assert plain_line == "No plain baseline was evaluated."
    assert lines_of(network("random", 0.9)) == verdict({})
    unmeasured = {"name": "searched", "role": "searched"}
    assert all("not measured" in line for line in lines_of(unmeasured, network("random", 0.8), network("plain", 0.8)))


def test_without_intervals_noise_is_not_judged():
    bare = {"role": "random", "worst_case": 0.5}
    line = lines_of({"role": "searched", "worst_case": 0.9}, bare)[0]
    assert "noise cannot be judged" in line
    assert "not measurably" in line


def test_numbers_in_doubt_are_named():
    failing = [{"name": "chance", "verdict": "fail", "detail": ""}]
    lines = lines_of(
        network("searched", 0.9, checks=failing),
        network("random", 0.8, n=500, attacks={"fgsm": 0.8}),
    )
    assert any("Masking checks failed" in line and "searched (chance)" in line for line in lines)
    assert any("different numbers of images (500, 1000)" in line for line in lines)
    assert any("not measured with the same attacks" in line for line in lines)


def test_a_search_that_collapsed_is_named():
    searched = {"epochs": [{"epoch": 0, "parameter_free_edges": {"robust": [8, 8]}}], "warnings": []}
    lines = verdict({"models": [network("searched", 0.9)], "search": searched})
    assert "may have collapsed: 8 of 8 edges of the robust cell" in lines[-1]


def test_about_three_lines_for_a_whole_run(results):
    assert len(verdict(results)) == 4
    del results["models"][-1]["checks"]
    assert len(verdict(results)) == 3


def test_natural_accuracy_gets_the_interval_of_its_count():
    """wilson(980, 1000) is [0.969, 0.987]: 0.98 and 0.96 lie apart, 0.98 and 0.97 do not."""
    searched = network("searched", 0.9, 0.98)
    assert "Natural" not in lines_of(searched, network("plain", 0.9, 0.97))[1]
    assert "4.0 points higher (beyond the 95% intervals)" in lines_of(searched, network("plain", 0.9, 0.94))[1]


def test_published_genotypes_get_a_line_of_their_own():
    published = network("published", 0.80, name="arnas-equal-macs")
    line = lines_of(network("searched", 0.90), network("plain", 0.80), published)[2]
    assert line.startswith("The searched network is more robust than arnas-equal-macs of equal size")


def test_a_line_fits_on_three():
    """At most three lines of the page, about 85 characters each."""
    models = [network("searched", 0.897), network("plain", 0.9), *(network("random", 0.85 + i / 100) for i in range(9))]
    assert max(map(len, lines_of(*models, network("compressed", 0.85, nonzero=250)))) < 255
