"""The ground: trees and leaves of tensors, derivatives, and all that touches what torch keeps private."""
