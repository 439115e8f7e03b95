-- Leads come in by INSERT, from a web form, say.
\if :{?api}
\else
\set api http://127.0.0.1:8099
\endif

CREATE TABLE leads (
    id       int PRIMARY KEY,
    email    text NOT NULL,
    domain   text GENERATED ALWAYS AS (split_part(email, '@', 2)) STORED,
    state    text NOT NULL DEFAULT 'new',     -- known, unknown, gave up, delivered
    attempts int NOT NULL DEFAULT 0,
    company  jsonb,
    crm_lead int
);

SELECT df.setvar('api', :'api');
