"""What a frozen target says about a batch: run now (online), read back (cached), or each piece run once (hybrid)."""

from dspark.training.features.cached import CachedFeatures
from dspark.training.features.modes import FeatureConfig, open_features
from dspark.training.features.online import OnlineTarget

__all__ = ["CachedFeatures", "FeatureConfig", "OnlineTarget", "open_features"]
