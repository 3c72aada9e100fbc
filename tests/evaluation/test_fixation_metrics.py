"""Fixation metrics: closed forms, plain loops, invariances, and the benchmark's own package where it is installed."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter

from evaluation import fixation_metrics as metrics
from evaluation.baselines import centre_gaussian


def score(metric, saliency, *fixations, sigma=metrics.BLUR_SIGMA):
    """A metric of a map on x, y and, for the shuffled AUC, the fixations elsewhere."""
    return metrics.METRICS[metric](metrics.Case.of(saliency, *fixations, sigma=sigma))


SINGLE = {name: partial(score, name) for name in metrics.METRICS if name != "sauc"}


def blurred(x, y, height, width, sigma):
    """The fixations that CC, SIM and KLD compare a map with."""
    return metrics.Case.of(np.zeros((height, width)), x, y, sigma=sigma).target


def random_fixations(count, height, width, seed=0):
    generator = np.random.default_rng(seed)
    return generator.uniform(0, width, count), generator.uniform(0, height, count)


@st.composite
def maps_with_fixations(draw):
    """Small integer maps, so that ties abound, with a few fixations, repeats among them."""
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    values = draw(arrays(np.float64, (height, width), elements=st.integers(-3, 3)))
    count = draw(st.integers(1, 12))
    x = draw(arrays(np.float64, count, elements=st.floats(0, width - 0.01)))
    y = draw(arrays(np.float64, count, elements=st.floats(0, height - 0.01)))
    return values, x, y


def auc_by_loops(positives, negatives):
    total = 0.0
    for positive in positives:
        for negative in negatives:
            total += 1.0 if positive > negative else 0.5 if positive == negative else 0.0
    return total / (len(positives) * len(negatives))


@settings(max_examples=60, deadline=None)
@given(maps_with_fixations(), st.integers(1, 9), st.integers(0, 1000))
def test_both_aucs_and_nss_equal_plain_loops(case, others, seed):
    values, x, y = case
    height, width = values.shape
    at = [values[math.floor(b), math.floor(a)] for a, b in zip(x, y, strict=True)]
    assert score("auc", values, x, y) == pytest.approx(auc_by_loops(at, values.ravel()), abs=1e-12)
    other_x, other_y = random_fixations(others, height, width, seed)
    elsewhere = [values[math.floor(b), math.floor(a)] for a, b in zip(other_x, other_y, strict=True)]
    shuffled = score("sauc", values, x, y, other_x, other_y)
    assert shuffled == pytest.approx(auc_by_loops(at, elsewhere), abs=1e-12)
    mean = sum(values.ravel()) / values.size
    std = math.sqrt(sum((v - mean) ** 2 for v in values.ravel()) / values.size)
    expected = sum((v - mean) / std for v in at) / len(at) if values.min() < values.max() else 0.0
    assert score("nss", values, x, y) == pytest.approx(expected, abs=1e-9)


def test_rows_are_y_and_columns_are_x():
    values = np.zeros((4, 6))
    values[1, 5] = 1
    assert score("auc", values, [5.9], [1.9]) == pytest.approx((23 + 0.5) / 24)
    assert score("auc", values, [1], [3]) == pytest.approx(0.5 * 23 / 24)
    assert np.argwhere(blurred([5.9], [1.9], 4, 6, sigma=0.1) > 0.5).tolist() == [[1, 5]]


def test_perfect_inverted_and_constant_map():
    x, y = np.array([3.0, 3.2, 7.5]), np.array([2.0, 2.7, 9.1])
    perfect = np.zeros((11, 10))
    perfect[y.astype(int), x.astype(int)] = 1  # 2 of 110 pixels, tied with themselves
    assert score("auc", perfect, x, y) == pytest.approx((108 + 1) / 110)
    assert score("auc", -perfect, x, y) == pytest.approx(1 / 110)
    assert score("sauc", perfect, x, y, [0, 1], [0, 1]) == 1.0
    assert score("nss", perfect, x, y) == pytest.approx(math.sqrt(108 / 2))
    for level in (0.0, 0.1, -7.3, 1e300, 3):
        constant = np.full((11, 10), level)
        assert score("auc", constant, x, y) == score("sauc", constant, x, y, x, y) == 0.5
        assert score("nss", constant, x, y) == score("cc", constant, x, y) == 0.0
        uniform = score("sim", np.ones((11, 10)), x, y, sigma=2)
        assert score("sim", constant, x, y, sigma=2) == pytest.approx(uniform)
        assert score("kld", constant, x, y, sigma=2) == pytest.approx(score("kld", np.ones((11, 10)), x, y, sigma=2))


def test_shuffled_auc_of_a_centre_blob_is_a_half_where_everybody_looks_at_the_centre():
    generator = np.random.default_rng(3)
    count, height, width = 6000, 60, 80
    x = (40 + 12 * generator.standard_normal(count)).clip(0, 79.9)
    y = (30 + 9 * generator.standard_normal(count)).clip(0, 59.9)
    image = np.arange(count) % 40
    sizes = np.full((40, 2), (height, width))
    blob = centre_gaussian(height, width)
    shuffled, plain = [], []
    for i in range(40):
        elsewhere = metrics.fixations_elsewhere(image, x, y, sizes, i)
        assert elsewhere[0].size == count - (image == i).sum()
        shuffled.append(score("sauc", blob, x[image == i], y[image == i], *elsewhere))
        plain.append(score("auc", blob, x[image == i], y[image == i]))
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.01)
    assert np.mean(plain) > 0.75


def test_fixations_elsewhere_are_scaled_by_size_and_stay_inside():
    sizes = np.array([[10, 30], [20, 10], [5, 5]])
    image = np.array([0, 1, 1, 2])
    x, y = np.array([1.0, 2.0, 2.0, 4.999999999999999]), np.array([1.0, 10.0, 10.0, 4.0])
    got_x, got_y = metrics.fixations_elsewhere(image, x, y, sizes, 0)
    np.testing.assert_allclose(got_x, [6, 6, 30])
    np.testing.assert_allclose(got_y, [5, 5, 8])
    score("sauc", np.eye(10, 30), x[:1], y[:1], got_x, got_y)  # the last lies inside, however it is rounded
    for width in range(1, 400):
        edge = metrics.fixations_elsewhere(
            np.array([0]), np.array([np.nextafter(7, 0)]), np.array([0.0]), np.array([[1, 7], [1, width]]), 1
        )
        assert edge[0][0] < width


@settings(max_examples=40, deadline=None)
@given(maps_with_fixations())
def test_aucs_only_see_the_order_and_nss_only_the_shape(case):
    values, x, y = case
    others = random_fixations(9, *values.shape)
    for changed in (np.exp(values), values**3, values * 1e-200, values.astype(np.float32), values.astype(np.int8)):
        assert score("auc", changed, x, y) == score("auc", values, x, y)
        assert score("sauc", changed, x, y, *others) == score("sauc", values, x, y, *others)
    for scale, shift in ((3.0, -2.0), (0.01, 5.0), (1e200, 0.0), (1e-200, 0.0), (1e308 / 4, 0.0)):
        assert score("nss", values * scale + shift, x, y) == pytest.approx(score("nss", values, x, y), abs=1e-9)
        assert score("cc", values * scale + shift, x, y) == pytest.approx(score("cc", values, x, y), abs=1e-9)
    assert score("nss", -values, x, y) == pytest.approx(-score("nss", values, x, y), abs=1e-12)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 5.0, 23.99])
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (37, 29)])
def test_blur_equals_scipy(size, sigma):
    x, y = random_fixations(20, *size)
    counts = np.zeros(size)
    np.add.at(counts, (y.astype(int), x.astype(int)), 1)
    found = blurred(x, y, *size, sigma=sigma)
    np.testing.assert_allclose(found, gaussian_filter(counts, sigma, mode="reflect"), rtol=1e-9, atol=1e-12)
    assert found.sum() == pytest.approx(20)


def test_cc_sim_and_kld_of_the_blurred_fixations_themselves():
    x, y = random_fixations(30, 40, 50)
    own = blurred(x, y, 40, 50, sigma=3)
    for scale in (1.0, 7.0):
        assert score("cc", scale * own, x, y, sigma=3) == pytest.approx(1)
        assert score("sim", scale * own, x, y, sigma=3) == pytest.approx(1)
        assert score("kld", scale * own, x, y, sigma=3) == pytest.approx(0, abs=1e-9)
    assert score("cc", -own, x, y, sigma=3) == pytest.approx(-1)


def test_sim_and_kld_by_hand():
    # A blur far narrower than a pixel leaves one fixation per cell: q = (1/2, 1/2, 0, 0).
    x, y = [0, 1], [0, 0]
    values = np.array([[1.0, 3.0], [0.0, 0.0]])
    assert score("sim", values, x, y, sigma=0.1) == pytest.approx(0.25 + 0.5)
    assert score("kld", values, x, y, sigma=0.1) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert score("sim", values - 5, x, y, sigma=0.1) == pytest.approx(0.75)  # shifted to minimum 0
    misses = score("kld", np.array([[0.0, 0.0], [1.0, 1.0]]), x, y, sigma=0.1)
    assert misses == pytest.approx(math.log(0.5 / metrics.KLD_EPSILON))


def test_no_fixations_and_one_fixation():
    values = np.arange(12.0).reshape(3, 4)
    for metric in SINGLE.values():
        assert math.isnan(metric(values, [], []))
        assert math.isfinite(metric(values, [2.5], [1.5]))
    assert math.isnan(score("sauc", values, [], [], [1], [1]))
    assert math.isnan(score("sauc", values, [1], [1], [], []))
    assert all(map(math.isnan, metrics.all_scores(values, [], [], [1], [1]).values()))
    assert score("auc", values, [2.5], [1.5]) == pytest.approx(6.5 / 12)


@pytest.mark.parametrize("fixations", [0, 1, 5])
@pytest.mark.parametrize("others", [0, 1, 5])
@pytest.mark.parametrize("level", [None, 0.0, 7.0, -3.0, 1e-320, 1e300])
def test_every_metric_is_defined_for_poor_data(fixations, others, level):
    """No fixation, one, or some, here and elsewhere, on a map of one value (`level`) or not: the module's table."""
    height, width = 12, 9
    values = np.random.default_rng(4).random((height, width)) if level is None else np.full((height, width), level)
    own, other = (random_fixations(count, height, width, seed) for seed, count in enumerate((fixations, others)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics.all_scores(values, *own, *other, sigma=2)
    assert list(scores) == list(metrics.METRICS)
    undefined = set(metrics.METRICS) if not fixations else set() if others else {"sauc"}
    assert {name for name, score in scores.items() if math.isnan(score)} == undefined
    if fixations and level is not None:
        uniform = metrics.all_scores(np.ones((height, width)), *own, *other, sigma=2)
        assert scores == pytest.approx(uniform, nan_ok=True) and (scores["auc"], scores["nss"], scores["cc"]) == (
            0.5,
            0,
            0,
        )
    assert metrics.inter_observer(*own, np.zeros(fixations, int), *other, height, width) == pytest.approx(
        dict.fromkeys(("auc", "sauc", "nss"), math.nan), nan_ok=True
    )


def test_one_pixel():
    scores = metrics.all_scores([[3.0]], [0.5], [0.5], [0], [0])
    assert scores == pytest.approx({"auc": 0.5, "sauc": 0.5, "nss": 0, "cc": 0, "sim": 1, "kld": 0}, abs=1e-9)


def test_one_fixation_by_hand():
    values = np.arange(6.0).reshape(2, 3)
    assert score("auc", values, [2], [1]) == pytest.approx(5.5 / 6)  # five pixels below, itself one half
    assert score("sauc", values, [1], [0], [0, 1, 2, 2], [0, 0, 0, 1]) == pytest.approx(1.5 / 4)
    assert score("nss", values, [2], [1]) == pytest.approx(2.5 / math.sqrt(35 / 12))


def test_all_scores_are_the_single_ones():
    values = np.random.default_rng(1).random((20, 30))
    x, y = random_fixations(9, 20, 30)
    others = random_fixations(40, 20, 30, seed=5)
    scores = metrics.all_scores(values, x, y, *others, sigma=4)
    assert tuple(scores) == tuple(metrics.METRICS)
    assert scores["sauc"] == score("sauc", values, x, y, *others)
    for name, metric in SINGLE.items():
        assert scores[name] == (metric(values, x, y) if name in ("auc", "nss") else metric(values, x, y, sigma=4))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_maps_with_nan_or_infinities_are_refused(name, bad):
    values = np.ones((4, 5))
    values[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinities"):
        SINGLE[name](values, [1], [1])


@pytest.mark.parametrize("x, y", [([5], [1]), ([1], [4]), ([-0.1], [1]), ([1], [-1]), ([np.nan], [1]), ([1, 2], [1])])
@pytest.mark.parametrize("name", SINGLE)
def test_fixations_outside_or_unpaired_are_refused(name, x, y):
    with pytest.raises(ValueError, match="fixations"):
        SINGLE[name](np.eye(4, 5), x, y)
    with pytest.raises(ValueError, match="fixations"):
        score("sauc", np.eye(4, 5), [1], [1], x, y)


@pytest.mark.parametrize("values", [np.ones(5), np.ones((2, 2, 3)), np.ones((0, 4)), np.full((2, 2), 1j), [["a"]]])
def test_arrays_that_are_no_map_are_refused(values):
    with pytest.raises(ValueError, match="map"):
        score("auc", values, [], [])


def test_sigma_must_be_positive():
    for sigma in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive"):
            score("cc", np.eye(5), [1], [1], sigma=sigma)


def test_inter_observer_equals_plain_loops():
    height, width, sigma = 30, 40, 2.5
    x, y = random_fixations(25, height, width)
    subject = np.random.default_rng(8).integers(0, 4, 25) * 3
    others = random_fixations(60, height, width, seed=4)
    expected = []
    for left_out in sorted(set(subject.tolist())):
        rest = np.zeros((height, width))
        for a, b, who in zip(x, y, subject, strict=True):
            rest[int(b), int(a)] += who != left_out
        prediction = gaussian_filter(rest, sigma)
        own = x[subject == left_out], y[subject == left_out]
        expected.append(
            (
                score("auc", prediction, *own),
                score("sauc", prediction, *own, *others),
                score("nss", prediction, *own),
            )
        )
    got = metrics.inter_observer(x, y, subject, *others, height, width, sigma=sigma)
    assert list(got) == ["auc", "sauc", "nss"]
    np.testing.assert_allclose(list(got.values()), np.mean(expected, axis=0), rtol=1e-6)


def test_inter_observer_of_agreeing_and_of_lonely_people():
    x, y, subject = np.array([5.0, 5.5, 5.2]), np.array([6.0, 6.5, 6.1]), np.array([0, 1, 2])
    others = np.array([30.0]), np.array([3.0])
    scores = metrics.inter_observer(x, y, subject, *others, 20, 40, sigma=2)
    assert scores["auc"] > 0.99 and scores["sauc"] == 1.0 and scores["nss"] > 5
    for people in ([7, 7, 7], [-1, 0, 1]):
        unknown = metrics.inter_observer(x, y, people, *others, 20, 40)
        assert all(map(math.isnan, unknown.values()))
    with pytest.raises(ValueError, match="subjects"):
        metrics.inter_observer(x, y, [0, 1], *others, 20, 40)


def test_against_pysaliency(monkeypatch):
    if not hasattr(np, "trapz"):  # numpy 2.4 took both away
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pysaliency = pytest.importorskip("pysaliency", exc_type=ImportError)
        from pysaliency.metrics import CC, SIM, MIT_KLDiv
    generator = np.random.default_rng(7)
    sizes = np.array([(40, 60), (50, 30), (33, 47)])
    images = [generator.integers(0, 255, (*size, 3)).astype(np.uint8) for size in sizes]
    maps = [generator.integers(0, 40, size) / 8 - 1 for size in sizes]  # with ties and negative values
    index = np.repeat([0, 1, 2], [30, 25, 20])
    x, y = generator.uniform(0, sizes[index, 1]), generator.uniform(0, sizes[index, 0])
    stimuli = pysaliency.Stimuli(images)
    fixations = pysaliency.Fixations.create_without_history(x, y, index)

    class Given(pysaliency.SaliencyMapModel):
        def _saliency_map(self, image):
            return next(m for m, i in zip(maps, images, strict=True) if i.shape == image.shape)

    model = Given(caching=False)
    targets = pysaliency.FixationMap(stimuli, fixations, kernel_size=metrics.BLUR_SIGMA)
    reference = {
        "auc": model.AUCs(stimuli, fixations),
        "sauc": model.AUCs(stimuli, fixations, nonfixations="shuffled"),
        "nss": model.NSSs(stimuli, fixations),
    }
    for i, saliency in enumerate(maps):
        own = index == i
        elsewhere = metrics.fixations_elsewhere(index, x, y, sizes, i)
        scores = metrics.all_scores(saliency, x[own], y[own], *elsewhere)
        target = targets.saliency_map(stimuli[i])
        expected = {name: values[own].mean() for name, values in reference.items()}
        with np.errstate(divide="ignore"):  # it takes logarithms of cells that are 0
            divergence = MIT_KLDiv(saliency, target)
        expected |= {"cc": CC(saliency, target), "sim": SIM(saliency, target), "kld": divergence}
        assert scores == pytest.approx(expected, abs=1e-9)
