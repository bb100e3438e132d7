"""Run the whole pipeline from one configuration: search, cut, retrain, measure, report."""
