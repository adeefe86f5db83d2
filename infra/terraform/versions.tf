terraform {
  required_version = ">= 1.6"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.37" # the version whose schema these files were checked against
    }
  }

  # No backend: where the state is kept is yours to say, see backend.tf.example.
}

provider "google" {
  project        = var.project
  region         = var.region
  default_labels = local.labels
}
