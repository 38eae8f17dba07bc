"""Statistics in a cache."""

import pickle


class FeatureStats:
    def __init__(self, capture_all=False, capture_mean_cov=False, max_items=None):
        self.capture_all, self.capture_mean_cov, self.max_items = capture_all, capture_mean_cov, max_items

    def save(self, path):
        with open(path, 'wb') as f:
            pickle.dump(vars(self), f)

    @staticmethod
    def load(path):
        stats = FeatureStats()
        with open(path, 'rb') as f:
            vars(stats).update(pickle.load(f))
        return stats


def get_feature_detector(url, device=None, num_gpus=1, rank=0, verbose=False):
    with open(url, 'rb') as f:
        return pickle.load(f).to(device)
