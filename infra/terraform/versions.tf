terraform {
  required_version = ">= 1.6"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.37" # the version whose schema these files were checked against
    }
  }

  # No backend: you choose where to keep the state, see backend.tf.example.
}

provider "google" {
  project        = var.project
  region         = var.region
  default_labels = local.labels
}
