"""Names under which tensors travel between the data loader, the module and the model."""

CONDITION_KEY = "condition"
DOSE_KEY = "dose"
CONDITION_FEATURES_KEY = "condition_features"

Z_KEY = "z"
W_KEY = "w"
QZ_KEY = "qz"
QW_KEY = "qw"
PW_KEY = "pw"
PX_KEY = "px"
PX_SHARED_KEY = "px_shared"
SHARED_HIDDEN_KEY = "shared_hidden"
THETA_KEY = "theta"
LIBRARY_KEY = "library"

OBSM_Z_KEY = "X_discover_z"
OBSM_W_KEY = "X_discover_w"
