"""sources: readers of raw data sets, one module per value of `data.source`. ../data/README.md says how to add one."""

from rrcm.utils.registry import Registry

# Readers by data.source: functions from the settings `Data` to a `RawDataset`. README.md says how to add one.
DATASETS = Registry(
    {
        "digits": "rrcm.sources.digits:read_digits",
        "fashion_mnist": "rrcm.sources.fashion_mnist:read_fashion_mnist",
        "cifar10": "rrcm.sources.cifar10:read_cifar10",
        "imagenet": "rrcm.sources.folders:read_imagenet",
        "pathmnist": "rrcm.sources.pathmnist:read_pathmnist",
        "imagefolder": "rrcm.sources.folders:read_imagefolder",
    }
)
