-- Less work for each start and each end of a workflow (docs/decisions/0009-checks-in-triggers.md).

-- CHECK constraints are kept as text, which each statement reads and plans anew before it uses them: with two of them a start
-- cost the server a sixth more. A trigger's function is compiled once a session. The rules and the errors stay.
ALTER TABLE duroxide.instances DROP CONSTRAINT instances_id_format_chk, DROP CONSTRAINT instances_status_chk;

-- SECURITY DEFINER: as in 0001. Also for updates, which queue nothing. The error is that of the constraint, as PostgreSQL has it.
CREATE OR REPLACE FUNCTION duroxide.on_start() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_broken text;
BEGIN
    IF NEW.id !~ '^[0-9a-f]{8}$' THEN
        v_broken := 'instances_id_format_chk';
    ELSIF NEW.status NOT IN ('pending', 'running', 'completed', 'failed', 'cancelled') THEN
        v_broken := 'instances_status_chk';
    ELSIF TG_OP = 'INSERT' THEN
        INSERT INTO duroxide.queue (instance_id) VALUES (NEW.id);
    END IF;
    IF v_broken IS NOT NULL THEN
        RAISE EXCEPTION 'new row for relation "instances" violates check constraint "%"', v_broken
            USING ERRCODE = '23514', SCHEMA = 'duroxide', TABLE = 'instances', CONSTRAINT = v_broken;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER on_change AFTER UPDATE OF id, status ON duroxide.instances
    FOR EACH ROW EXECUTE FUNCTION duroxide.on_start();

-- As in 0012, with a third element where no step's text has a place for a variable: then those of the caller need not be read.
-- A loop at the root shows them as part of its earlier rounds.
CREATE OR REPLACE FUNCTION duroxide.prepare_start(fut text, transaction_mode text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_template text := CASE WHEN lower(transaction_mode) = 'caller' THEN duroxide.graph_template(fut) END;
BEGIN
    RETURN CASE WHEN v_template IS NULL THEN ARRAY[NULL, fut, transaction_mode]
                -- The first id stands at the beginning, with as many digits as all others.
                ELSE ARRAY[v_template, (8 - strpos(substr(v_template, 10, 5), '"') + 1)::text,
                           -- Each node begins with a brace, and nothing else has to.
                           CASE WHEN strpos(replace(v_template, E'{"id":"\x01', ''), '{') = 0
                                     AND split_part(v_template, '"', 8) <> 'LOOP' THEN 'plain' END] END;
END $$;

-- What a workflow takes along of the caller's variables (SURFACE 7.2).
CREATE FUNCTION duroxide.my_vars() RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN COALESCE((SELECT jsonb_object_agg(v.name, COALESCE(v.sealed, v.value)) FROM duroxide.vars v
                      WHERE v.owner = duroxide.me() AND v.value IS NOT NULL), '{}');
END $$;

-- As in 0012, but that it looks into as few tables as it can.
CREATE OR REPLACE FUNCTION duroxide.start(prepared text[], label text, database text) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_template text := prepared[1];
    v_random text;
    v_id text;
BEGIN
    IF v_template IS NULL THEN
        IF prepared[3] IS NULL OR lower(prepared[3]) NOT IN ('caller', 'new') THEN
            RAISE EXCEPTION 'invalid transaction_mode "%" for df.start(): expected ''caller'' or ''new''', prepared[3]
                USING ERRCODE = '22023';
        ELSIF lower(prepared[3]) = 'new' THEN
            RETURN duroxide.launch(prepared[2], label, database);
        END IF;
        RETURN duroxide.submit(NULL, prepared[2], label, database);
    END IF;
    IF start.database IS NOT NULL AND NOT EXISTS (SELECT FROM pg_database d WHERE d.datname = start.database) THEN
        RAISE EXCEPTION 'database "%" does not exist', start.database USING ERRCODE = '3D000';
    END IF;
    -- Who has logged in may log in; and only superusers, always, have this privilege on a catalog. The others are looked up.
    IF current_user <> session_user OR has_table_privilege('pg_catalog.pg_authid'::regclass, 'INSERT') THEN
        PERFORM duroxide.check_submitter(false);
    END IF;
    FOR attempt IN 1 .. 10 LOOP
        v_random := gen_random_uuid();
        v_id := left(v_random, 8);
        INSERT INTO duroxide.instances (id, label, graph, vars, database)
        VALUES (v_id, start.label, replace(v_template, E'\x01', right(v_random, prepared[2]::integer))::jsonb,
                CASE WHEN prepared[3] = 'plain' THEN '{}' ELSE duroxide.my_vars() END, start.database)
        ON CONFLICT (id) DO NOTHING;
        IF FOUND THEN
            RETURN v_id;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'Failed to create instance' USING ERRCODE = '55000', DETAIL = 'Ten random ids were all taken.';
END $$;

-- As in 0012: replaced, so that plans that hold what prepare_start returned are made anew.
CREATE OR REPLACE FUNCTION df.start(fut text, label text DEFAULT NULL, database text DEFAULT NULL,
                                    transaction_mode text DEFAULT 'caller') RETURNS text
LANGUAGE sql
RETURN duroxide.start(duroxide.prepare_start(fut, transaction_mode), label, database);
