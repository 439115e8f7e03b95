-- State of the engine: tables, row security, and the functions through which workers change state.
-- Runs once, in one transaction, under an advisory lock (engine/migrate.py), as the role that will own it all.
-- The schemas `duroxide` and `df` exist already when this runs.

-- Who calls. In policies and defaults; quote_ident makes mixed-case role names work. RETURN: its names are resolved here
-- (migrate.py pins the search_path of this session), and the planner can inline it.
CREATE FUNCTION duroxide.me() RETURNS regrole
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_catalog.quote_ident(current_user)::regrole;

-- Settings that SQL functions need, mirrored by the worker and `dfproxy init`; only the owner writes.
CREATE TABLE duroxide.settings (
    name  text PRIMARY KEY,
    value text NOT NULL
);

-- One row is a workflow. Written at start and at its end, never in between.
CREATE TABLE duroxide.instances (
    id           text COLLATE "C" PRIMARY KEY,
    label        text,
    graph        jsonb NOT NULL,                -- the flattened nodes, in pre-order; never changed
    vars         jsonb NOT NULL DEFAULT '{}',   -- the submitter's variables at start
    database     text,                          -- where steps run; null: here
    submitted_by regrole NOT NULL DEFAULT duroxide.me(),
    status       text NOT NULL DEFAULT 'pending',
    output       text,                          -- final result, or error text
    error        jsonb,                         -- {"message","sqlstate","detail","hint"}
    interpreter  smallint NOT NULL DEFAULT 1,   -- which rules this instance is run by
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    started_at   timestamptz,
    ended_at     timestamptz,
    CONSTRAINT instances_id_format_chk CHECK (id ~ '^[0-9a-f]{8}$'),
    CONSTRAINT instances_status_chk CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled'))
) WITH (fillfactor = 80);
CREATE INDEX idx_instances_status ON duroxide.instances (status, created_at DESC, id);
CREATE INDEX idx_instances_created_at ON duroxide.instances (created_at DESC, id);
CREATE INDEX idx_instances_label ON duroxide.instances (label, created_at DESC, id) WHERE label IS NOT NULL;

-- A worker process. One UPDATE a heartbeat stands for all its instances.
CREATE TABLE duroxide.workers (
    id           uuid PRIMARY KEY,
    name         text NOT NULL,
    version      text NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease        interval NOT NULL
) WITH (fillfactor = 50);

-- An unfinished instance: runnable or parked (owner null), or held by a worker. Narrow, and gone when it ends.
-- No foreign key to workers: it would lock the worker's row at every claim and check what claim and heartbeat ensure.
CREATE TABLE duroxide.queue (
    instance_id text COLLATE "C" PRIMARY KEY,
    wake_at     timestamptz NOT NULL DEFAULT now(),   -- infinity: only a signal or a cancel wakes it
    owner       uuid,                                 -- the worker that holds it
    token       uuid,                                 -- fencing token: fresh at every claim, unguessable
    claims      integer NOT NULL DEFAULT 0,
    crashes     integer NOT NULL DEFAULT 0,           -- how often a worker was lost while it held this instance
    started_at  timestamptz                           -- first claim; what makes df.instances say `running`
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500);
CREATE INDEX queue_due ON duroxide.queue (wake_at) WHERE owner IS NULL;
CREATE INDEX queue_held ON duroxide.queue (owner) WHERE owner IS NOT NULL;

-- A checkpoint. The key says where in the graph it belongs: `execution` is the loop path ('' outside loops,
-- '/3:2' in round 2 of the loop at node 3, '/3:2/7:1' nested), `node` the node's place in the graph array.
CREATE TABLE duroxide.history (
    instance_id text COLLATE "C" NOT NULL,
    execution   text COLLATE "C" NOT NULL,
    node        integer NOT NULL,
    event       text NOT NULL,        -- completed, failed, waiting, started, decided, round
    result      text,                 -- the engine's JSON text
    types       jsonb,                -- columns of a SQL result: [{"name","oid","type"}]
    error       jsonb,                -- {"message","sqlstate","detail","hint"}
    meta        jsonb,
    started_at  timestamptz,
    ended_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (instance_id, execution, node)
) WITH (fillfactor = 90);

-- Signals and cancel requests: the durable inbox. Insert-only for callers, so that a caller who leaves a
-- transaction open never blocks the engine. `seen`: whoever holds the instance has taken it in. The engine deletes what a
-- wait has consumed.
CREATE TABLE duroxide.signals (
    seq         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    instance_id text COLLATE "C" NOT NULL,
    kind        text NOT NULL DEFAULT 'signal' CHECK (kind IN ('signal', 'cancel')),
    name        text NOT NULL,        -- the signal's name; for a cancel, its reason
    data        text,                 -- JSON text
    sent_at     timestamptz NOT NULL DEFAULT now(),
    seen        boolean NOT NULL DEFAULT false
);
CREATE INDEX signals_instance ON duroxide.signals (instance_id, seq);
CREATE INDEX signals_unseen ON duroxide.signals (instance_id) WHERE NOT seen;

CREATE TABLE duroxide.vars (
    owner regrole NOT NULL DEFAULT duroxide.me(),
    name  text NOT NULL,
    value text,
    PRIMARY KEY (owner, name)
);

-- Executor logins: steps of `role` run on connections that log in as `executor` (docs/security.md).
CREATE TABLE duroxide.executors (
    role       regrole PRIMARY KEY,
    executor   regrole NOT NULL UNIQUE,
    password_set boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The secret from which executor passwords derive, unless the settings name another. Readable by the owner alone.
CREATE TABLE duroxide.secret (
    one   boolean PRIMARY KEY DEFAULT true CHECK (one),
    value text NOT NULL DEFAULT pg_catalog.replace(
        pg_catalog.gen_random_uuid()::text || pg_catalog.gen_random_uuid()::text, '-', '')
);
INSERT INTO duroxide.secret DEFAULT VALUES;

-- Row security: a role sees its own rows. The owner (the service role), superusers and BYPASSRLS roles see all.
ALTER TABLE duroxide.instances ENABLE ROW LEVEL SECURITY;
ALTER TABLE duroxide.queue     ENABLE ROW LEVEL SECURITY;
ALTER TABLE duroxide.history   ENABLE ROW LEVEL SECURITY;
ALTER TABLE duroxide.signals   ENABLE ROW LEVEL SECURITY;
ALTER TABLE duroxide.vars      ENABLE ROW LEVEL SECURITY;

CREATE POLICY instances_user_isolation ON duroxide.instances
    USING (submitted_by = (SELECT duroxide.me()))   -- a sub-select: once a query, not once a row
    WITH CHECK (submitted_by = duroxide.me());
CREATE POLICY vars_user_isolation ON duroxide.vars
    USING (owner = (SELECT duroxide.me())) WITH CHECK (owner = duroxide.me());
-- The sub-select is itself under instances_user_isolation.
CREATE POLICY queue_user_isolation ON duroxide.queue FOR SELECT
    USING (EXISTS (SELECT FROM duroxide.instances i WHERE i.id = instance_id));
CREATE POLICY history_user_isolation ON duroxide.history FOR SELECT
    USING (EXISTS (SELECT FROM duroxide.instances i WHERE i.id = instance_id));
CREATE POLICY signals_user_isolation ON duroxide.signals
    USING (EXISTS (SELECT FROM duroxide.instances i WHERE i.id = instance_id))
    WITH CHECK (EXISTS (SELECT FROM duroxide.instances i WHERE i.id = instance_id));

-- SECURITY DEFINER: a start is an INSERT that the caller's own privileges and row security allow; the queue row
-- that follows from it must not be writable by the caller, who could otherwise wake, park or own instances.
CREATE FUNCTION duroxide.on_start() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO duroxide.queue (instance_id) VALUES (NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER on_start AFTER INSERT ON duroxide.instances
    FOR EACH ROW EXECUTE FUNCTION duroxide.on_start();

-- SECURITY DEFINER: cancelling is an INSERT into signals that row security allows only for one's own instance;
-- the status that follows must not be writable by hand.
CREATE FUNCTION duroxide.on_cancel() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE duroxide.instances
       SET status = 'cancelled', output = 'canceled: ' || NEW.name, updated_at = clock_timestamp(),
           ended_at = clock_timestamp(),
           started_at = COALESCE(started_at, (SELECT q.started_at FROM duroxide.queue q WHERE q.instance_id = id))
     WHERE id = NEW.instance_id AND status IN ('pending', 'running');
    RETURN NULL;
END $$;
CREATE TRIGGER on_cancel AFTER INSERT ON duroxide.signals
    FOR EACH ROW WHEN (NEW.kind = 'cancel') EXECUTE FUNCTION duroxide.on_cancel();

-- A worker's life sign and reaper in one: renews its own lease, frees the instances of workers whose lease ran out.
-- False: this worker itself was given up; it must drop everything and register anew.
-- Three statements, each with a snapshot of its own: what a lost worker claimed until its row was locked is seen and freed,
-- and what it tries to claim from then on is refused (claim locks the same row).
CREATE FUNCTION duroxide.heartbeat(p_worker uuid) RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_alive boolean;
    v_lost uuid[];
BEGIN
    UPDATE duroxide.workers SET heartbeat_at = clock_timestamp() WHERE id = p_worker;
    v_alive := FOUND;
    v_lost := ARRAY(SELECT w.id FROM duroxide.workers w
                     WHERE w.heartbeat_at + w.lease < clock_timestamp() AND w.id <> p_worker
                       FOR UPDATE SKIP LOCKED);
    IF v_lost <> '{}' THEN
        -- If the server itself was away the worker may be well, and its instances are not to blame.
        UPDATE duroxide.queue q
           SET owner = NULL, token = NULL, wake_at = clock_timestamp(),
               crashes = q.crashes + CASE WHEN w.heartbeat_at < pg_postmaster_start_time() THEN 0 ELSE 1 END
          FROM duroxide.workers w WHERE w.id = ANY (v_lost) AND q.owner = w.id;
        DELETE FROM duroxide.workers WHERE id = ANY (v_lost);
    END IF;
    -- Owners that are not registered at all: somebody deleted from workers by hand.
    UPDATE duroxide.queue q SET owner = NULL, token = NULL, wake_at = clock_timestamp()
     WHERE q.owner IS NOT NULL AND NOT EXISTS (SELECT FROM duroxide.workers w WHERE w.id = q.owner);
    RETURN v_alive;
END $$;

-- A worker that stops gives back everything, and is forgotten. Its row goes first: a claim of its that is still under way
-- is waited for, and then freed with the rest.
CREATE FUNCTION duroxide.leave(p_worker uuid) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM duroxide.workers WHERE id = p_worker;
    UPDATE duroxide.queue SET owner = NULL, token = NULL, wake_at = clock_timestamp() WHERE owner = p_worker;
END $$;

-- Claims up to p_limit instances that are due or have something unseen in their inbox; the latter get at most half while
-- others are due, so that neither kind starves the other. Nothing for a worker that is not registered (any more).
-- Plans are made for a queue of millions, whatever the statistics said when they were made.
CREATE FUNCTION duroxide.claim(p_worker uuid, p_limit integer)
RETURNS TABLE (instance_id text, token uuid, fresh boolean, crashes integer)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_called text[];
    v_due text[];
BEGIN
    IF p_limit <= 0 THEN
        RETURN;
    END IF;
    v_called := ARRAY(SELECT q.instance_id FROM duroxide.signals s JOIN duroxide.queue q ON q.instance_id = s.instance_id
                       WHERE NOT s.seen AND q.owner IS NULL
                       LIMIT (p_limit + 1) / 2 FOR UPDATE OF q SKIP LOCKED);
    v_due := ARRAY(SELECT q.instance_id FROM duroxide.queue q
                    WHERE q.owner IS NULL AND q.wake_at <= v_now
                    ORDER BY q.wake_at LIMIT p_limit - cardinality(v_called) FOR UPDATE SKIP LOCKED);
    v_due := v_due || v_called;
    IF v_due = '{}' THEN
        RETURN;
    END IF;
    PERFORM FROM duroxide.workers w WHERE w.id = p_worker FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE duroxide.signals s SET seen = true
     WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n
                      WHERE NOT n.seen AND n.instance_id = ANY (v_due) FOR UPDATE SKIP LOCKED);
    RETURN QUERY
    UPDATE duroxide.queue q
       SET owner = p_worker, token = gen_random_uuid(), claims = q.claims + 1, started_at = COALESCE(q.started_at, v_now)
     WHERE q.instance_id = ANY (v_due)
    RETURNING q.instance_id, q.token, q.claims = 1, q.crashes;
END $$;

-- When the next parked instance is due; NULL if none ever will be by itself.
CREATE FUNCTION duroxide.next_due() RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off
AS $$
BEGIN
    RETURN (SELECT q.wake_at FROM duroxide.queue q
             WHERE q.owner IS NULL AND q.wake_at > now() AND q.wake_at < 'infinity' ORDER BY q.wake_at LIMIT 1);
END $$;

-- Whether anything is due that nobody holds.
CREATE FUNCTION duroxide.overdue() RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM duroxide.queue q WHERE q.owner IS NULL AND q.wake_at <= clock_timestamp());
END $$;

-- Inbox entries of instances that this worker holds, until it says (p_handled, seqs) that it has taken them in: an answer
-- that is lost on its way costs nothing. Like claim, it passes by what a caller's open transaction has locked (a delete),
-- which must not hold up the worker.
CREATE FUNCTION duroxide.inbox(p_worker uuid, p_handled bigint[])
RETURNS TABLE (seq bigint, instance_id text, kind text, name text, data text)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    IF p_handled <> '{}' THEN
        UPDATE duroxide.signals s SET seen = true
         WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n WHERE n.seq = ANY (p_handled) AND NOT n.seen
                            FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN QUERY
    SELECT s.seq, s.instance_id, s.kind, s.name, s.data
      FROM duroxide.signals s JOIN duroxide.queue q ON q.instance_id = s.instance_id
     WHERE NOT s.seen AND q.owner = p_worker LIMIT 1000;
END $$;

-- Records what a worker knows, if and only if it still holds the instance (p_token); otherwise raises DF001, which
-- rolls back the step that runs in the same transaction.
--   p_rows: JSON array of history rows {"execution","node","event","result","types","error","meta","started_at"};
--           a row that exists already is replaced (waiting -> completed; the next round of a loop).
--   p_result: the text of the result of the row whose "result" is absent and "big" is true (spares JSON escaping).
--   p_consumed: signals.seq taken by waits.
--   p_prune: loop paths ('/3:2') whose rows go, with everything nested in them, except the keys in p_keep
--            (JSON array of [execution, node]).
--   p_park: give the instance back until then (infinity: until its inbox wakes it).
--   p_finish: {"status","output","error"}; "output_is_result": true takes p_result as output. Ends the instance.
-- SECURITY DEFINER: executors call this at the end of a step's transaction; they may not touch these tables, and
-- prove their right by the token.
CREATE FUNCTION duroxide.checkpoint(
    p_instance text, p_token uuid, p_rows jsonb, p_result text DEFAULT NULL,
    p_consumed bigint[] DEFAULT NULL, p_prune text[] DEFAULT NULL, p_keep jsonb DEFAULT NULL,
    p_park timestamptz DEFAULT NULL, p_finish jsonb DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_started timestamptz;
    v_path text;
BEGIN
    SELECT q.started_at INTO v_started FROM duroxide.queue q
     WHERE q.instance_id = p_instance AND q.token = p_token FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'lease on instance % lost', p_instance USING ERRCODE = 'DF001';
    END IF;
    INSERT INTO duroxide.history AS h
           (instance_id, execution, node, event, result, types, error, meta, started_at)
    SELECT p_instance, r.execution, r.node, r.event, CASE WHEN r.big THEN p_result ELSE r.result END,
           r.types, r.error, r.meta, r.started_at
      FROM jsonb_to_recordset(p_rows) AS r(execution text, node integer, event text, result text, big boolean,
                                           types jsonb, error jsonb, meta jsonb, started_at timestamptz)
    ON CONFLICT (instance_id, execution, node) DO UPDATE
       SET event = EXCLUDED.event, result = EXCLUDED.result, types = EXCLUDED.types, error = EXCLUDED.error,
           meta = CASE EXCLUDED.event WHEN 'failed' THEN COALESCE(EXCLUDED.meta, h.meta) ELSE EXCLUDED.meta END,
           started_at = COALESCE(EXCLUDED.started_at, h.started_at),
           ended_at = EXCLUDED.ended_at;
    IF p_consumed IS NOT NULL THEN
        DELETE FROM duroxide.signals WHERE seq = ANY (p_consumed) AND instance_id = p_instance;
    END IF;
    IF p_prune IS NOT NULL THEN
        FOREACH v_path IN ARRAY p_prune LOOP
            DELETE FROM duroxide.history h
             WHERE h.instance_id = p_instance
               AND (h.execution = v_path OR (h.execution > v_path || '/' AND h.execution < v_path || '0'))
               AND NOT COALESCE(p_keep, '[]') @> jsonb_build_array(jsonb_build_array(h.execution, h.node));
        END LOOP;
    END IF;
    IF p_finish IS NOT NULL THEN
        -- A cancel that committed first has set the status already; it stays.
        UPDATE duroxide.instances
           SET status = p_finish->>'status',
               output = CASE WHEN (p_finish->>'output_is_result')::boolean THEN p_result ELSE p_finish->>'output' END,
               error = NULLIF(p_finish->'error', 'null'), started_at = v_started,
               updated_at = clock_timestamp(), ended_at = clock_timestamp()
         WHERE id = p_instance AND status IN ('pending', 'running');
        DELETE FROM duroxide.queue WHERE instance_id = p_instance;
        DELETE FROM duroxide.signals WHERE instance_id = p_instance;
    ELSIF p_park IS NOT NULL THEN
        UPDATE duroxide.queue SET owner = NULL, token = NULL, wake_at = p_park WHERE instance_id = p_instance;
    END IF;
END $$;

-- Several checkpoints in one transaction, each as the JSON array of checkpoint's arguments in their text form. Returns the
-- places (from 1) of those whose lease is lost; the others are written.
CREATE FUNCTION duroxide.checkpoints(p_items jsonb) RETURNS integer[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_item jsonb;
    v_place integer := 0;
    v_lost integer[] := '{}';
BEGIN
    FOR v_item IN SELECT e.value FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e(value, n) ORDER BY e.n LOOP
        v_place := v_place + 1;
        PERFORM FROM duroxide.queue q WHERE q.instance_id = v_item->>0 AND q.token = (v_item->>1)::uuid FOR UPDATE;
        IF FOUND THEN
            PERFORM duroxide.checkpoint(v_item->>0, (v_item->>1)::uuid, (v_item->>2)::jsonb, v_item->>3, (v_item->>4)::bigint[],
                                        (v_item->>5)::text[], (v_item->>6)::jsonb, (v_item->>7)::timestamptz, (v_item->>8)::jsonb);
        ELSE
            v_lost := v_lost || v_place;
        END IF;
    END LOOP;
    RETURN v_lost;
END $$;

-- Gives instances back, due at once (a worker that shuts down, or found its own view of one to be stale).
CREATE FUNCTION duroxide.release(p_worker uuid, p_instances text[])
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    UPDATE duroxide.queue SET owner = NULL, token = NULL, wake_at = clock_timestamp()
     WHERE owner = p_worker AND instance_id = ANY (p_instances)
$$;

REVOKE ALL ON ALL TABLES IN SCHEMA duroxide FROM PUBLIC;
REVOKE ALL ON FUNCTION duroxide.heartbeat(uuid), duroxide.leave(uuid), duroxide.claim(uuid, integer),
    duroxide.next_due(), duroxide.overdue(), duroxide.inbox(uuid, bigint[]), duroxide.release(uuid, text[]),
    duroxide.checkpoints(jsonb), duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb) FROM PUBLIC;
