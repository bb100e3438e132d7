"""The whole job from one configuration: search, cut, retrain, measure, report."""
