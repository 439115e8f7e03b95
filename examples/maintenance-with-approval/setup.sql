-- Two tables that have become bloated, and one that is well. Autovacuum is off so that they stay so for the example.
\if :{?api}
\else
\set api http://127.0.0.1:8099
\endif

CREATE TABLE events (id int PRIMARY KEY, payload text) WITH (autovacuum_enabled = off);
CREATE TABLE "Visits" (id int PRIMARY KEY, seen int) WITH (autovacuum_enabled = off);
CREATE TABLE settings (name text PRIMARY KEY, value text);
INSERT INTO events SELECT n, 'event ' || n FROM generate_series(1, 5000) n;
INSERT INTO "Visits" SELECT n, 0 FROM generate_series(1, 3000) n;
INSERT INTO settings SELECT 'setting ' || n, 'x' FROM generate_series(1, 100) n;
UPDATE events SET payload = upper(payload);
UPDATE "Visits" SET seen = seen + 1;

-- What the statistics say. In production: also how large the table is, and what share of it is dead.
CREATE VIEW bloated AS
SELECT relid::regclass AS tab, n_dead_tup AS dead
  FROM pg_stat_user_tables WHERE n_dead_tup > 1000 AND n_dead_tup > 0.2 * n_live_tup;

-- Who was asked what, and what came of it.
CREATE TABLE maintenance (
    workflow    text PRIMARY KEY,
    tab         regclass NOT NULL,
    dead        bigint NOT NULL,
    asked_at    timestamptz NOT NULL DEFAULT now(),
    decision    text,
    decided_by  text,
    vacuumed_at timestamptz
);

SELECT df.setvar('api', :'api');
