variable "project" {
  type        = string
  description = "Id of the Google Cloud project; it must exist and have billing."

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "project must be the project's id (my-project-123), not its name or number."
  }
}

variable "region" {
  type        = string
  default     = "us-central1"
  description = "Region of the buckets, the tables, the images and the jobs."

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region such as us-central1, not a zone or multi-region."
  }
}

variable "name" {
  type        = string
  default     = "chatflow"
  description = "Prefix of all names, so that several installations fit into one project."

  # The longest name made from it is NAME-launcher, and service accounts have at most 30 characters.
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,17}[a-z0-9]$", var.name))
    error_message = "name must have 3 to 19 lower-case letters, digits and dashes, begin with a letter and not end with a dash."
  }
}

variable "labels" {
  type        = map(string)
  default     = {}
  description = "Labels for everything that can have them, in addition to app = NAME."
}

variable "kms_key_name" {
  type        = string
  default     = null
  description = "Cloud KMS key (projects/P/locations/REGION/keyRings/R/cryptoKeys/K) for stored data; null: Google's own keys."

  validation {
    condition     = var.kms_key_name == null || can(regex("^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$", var.kms_key_name))
    error_message = "kms_key_name must be null, or projects/P/locations/REGION/keyRings/R/cryptoKeys/K without a version."
  }
}

variable "subnetwork" {
  type        = string
  default     = ""
  description = "Subnetwork for the workers (regions/R/subnetworks/S, or the full URL of one in a shared VPC); empty: Terraform creates one."

  validation {
    condition     = var.subnetwork == "" || can(regex("regions/[^/]+/subnetworks/[^/]+$", var.subnetwork))
    error_message = "subnetwork must be empty, regions/R/subnetworks/S, or https://www.googleapis.com/compute/v1/projects/P/regions/R/subnetworks/S."
  }
}

variable "read_buckets" {
  type        = list(string)
  default     = []
  description = "Other buckets that the workers may read: chats, or weights."
}

variable "remote_models" {
  type        = bool
  default     = false
  description = "Whether the workers may call models on Vertex AI (--inference=remote)."
}

variable "events_retention" {
  type        = string
  default     = "604800s"
  description = "How long messages wait while no pipeline runs, in seconds: 600s to 2678400s (31 days)."

  validation {
    condition     = can(regex("^[0-9]+s$", var.events_retention)) && try(tonumber(trimsuffix(var.events_retention, "s")) >= 600 && tonumber(trimsuffix(var.events_retention, "s")) <= 2678400, false)
    error_message = "events_retention must be a number of seconds from 600s to 2678400s."
  }
}

variable "deletion_protection" {
  type        = bool
  default     = true
  description = "Whether Terraform refuses to delete tables and buckets that hold data."
}

variable "alert_emails" {
  type        = list(string)
  default     = []
  description = "Who gets alerts; empty: alerts are shown in the console only."

  validation {
    condition     = alltrue([for email in var.alert_emails : can(regex("^[^@ ]+@[^@ ]+$", email))])
    error_message = "alert_emails must be addresses such as on-call@example.com."
  }
}

variable "dead_letters_per_minute" {
  type        = number
  default     = 5
  description = "Alert when there are more dead letters a minute than this, on average over five minutes."

  validation {
    condition     = var.dead_letters_per_minute >= 0
    error_message = "dead_letters_per_minute must be 0 (alert on any) or more."
  }
}

variable "backlog_age_seconds" {
  type        = number
  default     = 600
  description = "Alert when the oldest unprocessed message is older than this."

  validation {
    condition     = var.backlog_age_seconds > 0
    error_message = "backlog_age_seconds must be more than 0."
  }
}

variable "freshness_seconds" {
  type        = number
  default     = 1800
  description = "Alert when a job's watermark is further behind than this."

  validation {
    condition     = var.freshness_seconds > 0
    error_message = "freshness_seconds must be more than 0."
  }
}
