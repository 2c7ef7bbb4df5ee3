"""Fit a linear classifier on frozen features with scikit-learn: a linear probe (`ufgir probe`).

Shapes: n images, F features, K classes.
"""

from typing import NamedTuple

import numpy as np

from ..utils.extras import install_command


MISSING = "a linear probe needs scikit-learn"
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # inverse regularization strengths to choose from
FOLDS = 3  # of cross-validation, at most
STEPS = 2000  # of the optimizer, at most


class Probe(NamedTuple):
    """A linear classifier.

    Attributes:
        weight: (K, F).
        bias: (K,).
        strength: the inverse regularization strength that was chosen.
        accuracy: cross-validated accuracy at this strength; None if a class has a single image, so that nothing could be chosen.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    accuracy: float | None


def fit_probe(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Probe:
    """Fit multinomial logistic regression on standardized features. Cross-validation chooses the regularization strength.

    The standardization is folded into weight and bias, so that the probe applies to the features as they are.

    Args:
        features: (n, F), finite.
        labels: (n,), class indices in [0, num_classes).
        num_classes: number of classes K, at least 2.

    Raises:
        ValueError: if there are fewer than two classes, or a class has no image.
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(f"{MISSING}: {install_command('analysis')}") from error
    counts = np.bincount(labels, minlength=num_classes)
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
    if lacking := np.flatnonzero(counts == 0).tolist():
        raise ValueError(
            f"`labels` must contain every class; {len(lacking)} have no image, the first is {lacking[0]}."
        )
    features = np.asarray(features, dtype=np.float64)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))
    accuracy, strength = None, 1.0
    if counts.min() > 1:
        grid = {"logisticregression__C": list(STRENGTHS)}
        search = GridSearchCV(model, grid, cv=min(FOLDS, int(counts.min())), refit=False).fit(features, labels)
        accuracy, strength = float(search.best_score_), search.best_params_["logisticregression__C"]
    scaler, linear = model.set_params(logisticregression__C=strength).fit(features, labels)
    weight, bias = linear.coef_, linear.intercept_
    if num_classes == 2:  # one row, for the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    return Probe(weight, bias - weight @ scaler.mean_, strength, accuracy)
