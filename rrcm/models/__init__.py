"""models: networks, and classifiers of noisy images that use them. README.md says how to add a classifier."""

from rrcm.utils.registry import Registry

# Classifiers in model folders, by the `kind` in config.json: (folder, config.json) -> `LoadedClassifier`.
FOLDER_LOADERS = Registry(
    {
        "classifier": "rrcm.models.checkpoints:load_classifier_folder",
        "network": "rrcm.models.architectures:load_network_folder",
        "ensemble": "rrcm.models.ensembles:load_ensemble",
        "denoised": "rrcm.models.denoised:load_denoised",
        "unconditioned": "rrcm.models.unconditioned:load_unconditioned",
    }
)
# What fine-tuning trains, by the `kind` of the model folder it writes: (encoder, number of classes, t) -> classifier.
TRAINED_CLASSIFIERS = Registry({"classifier": "rrcm.models.base_classifiers:NoiseConditionedClassifier"})
TRAINED_CLASSIFIERS["unconditioned"] = "rrcm.models.unconditioned:UnconditionedClassifier"  # an ablation
# Classifiers that denoise first, by the `classifier` of a method. Each also takes its own settings, by name.
DENOISING_CLASSIFIERS = Registry(
    {
        "dds": "rrcm.models.denoised:DDS",
        "densepure": "rrcm.models.denoised:DensePure",
        "diffsmooth": "rrcm.models.denoised:DiffSmooth",
    }
)
# Networks in the place of the ViT, with random weights, by the setting `model.architecture`; else it is a name of timm.
NETWORKS = Registry(
    {
        "lenet": "rrcm.models.convnets:LeNet",
        "resnet110": "rrcm.models.convnets:resnet110",
        "timm": "rrcm.models.timm_models:build_timm",
    }
)
# Where the encoder that a fine-tuning starts from may come from, and the weights of a network in the place of the ViT.
ENCODERS = Registry(
    {
        "folder": "rrcm.models.checkpoints:load_encoder_folder",
        "file": "rrcm.models.authors:load_authors_encoder",
        "timm": "rrcm.models.timm_vit:load_timm_encoder",
        "timm network": "rrcm.models.timm_network:copy_timm_weights",
    }
)
