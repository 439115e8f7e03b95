#!/usr/bin/env bash
# First start of the database: a service role for dfproxy, and a role with a database for the application.
# ADMIN OPTION on `app` lets the service role make the executor login that steps of `app` run as (docs/security.md).
set -euo pipefail
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    -v service="$DFPROXY_SERVICE_PASSWORD" -v app="$DFPROXY_APP_PASSWORD" <<'SQL'
CREATE ROLE dfproxy LOGIN NOSUPERUSER CREATEROLE PASSWORD :'service';
CREATE ROLE app LOGIN NOSUPERUSER PASSWORD :'app';
GRANT app TO dfproxy WITH ADMIN OPTION;
CREATE DATABASE app OWNER app;
GRANT CREATE ON DATABASE app TO dfproxy;
SQL
