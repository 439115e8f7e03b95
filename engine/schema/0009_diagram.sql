-- df.diagram: a workflow as a Mermaid flowchart. And the end of workflows: df.delete_instance, df.prune.

-- A label for Mermaid, in its quotes.
CREATE FUNCTION duroxide.mermaid(label text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT
RETURN '"' || replace(replace(replace(replace(replace(replace(regexp_replace(label, '\s+', ' ', 'g'),
    '#', '#35;'), '&', '#amp;'), '"', '#quot;'), '<', '#lt;'), '>', '#gt;'), '`', '#96;') || '"';

-- The flowchart of a graph (docs/architecture.md). `classes` holds a status per node, or is NULL for a dry run.
-- Children come after their parents, so from the last node to the first, each knows by which boxes its children are entered
-- and left. Box n<place> is a node, m<place> the point where its branches meet again or its loop ends.
CREATE FUNCTION duroxide.diagram_graph(graph jsonb, classes text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_nodes jsonb[] := ARRAY(SELECT n.value FROM jsonb_array_elements(graph) WITH ORDINALITY n(value, i) ORDER BY n.i);
    v_count integer := cardinality(v_nodes);
    v_entries text[] := array_fill(''::text, ARRAY[v_count]);
    v_exits text[] := array_fill(''::text, ARRAY[v_count]);
    v_loops integer[] := array_fill(NULL::integer, ARRAY[v_count]);    -- the place of the loop that a node is in
    v_boxes text[] := array_fill(NULL::text, ARRAY[2 * v_count]);
    v_edges text[] := '{}';
    v_node jsonb;
    v_type text;
    v_label text;
    v_box text;
    v_end text;
    v_child integer;
    v_children integer[];
    v_left integer;
    v_right integer;
    v_condition integer;
BEGIN
    FOR i IN 1 .. v_count LOOP
        v_node := v_nodes[i];
        v_left := v_node->'left';
        v_right := v_node->'right';
        v_condition := v_node->'condition';
        FOREACH v_child IN ARRAY ARRAY[v_left, v_right, v_condition]
                || ARRAY(SELECT e.value::integer FROM jsonb_array_elements_text(v_node->'extras') e) LOOP
            CONTINUE WHEN v_child IS NULL;
            v_loops[v_child + 1] := CASE v_node->>'type' WHEN 'LOOP' THEN i - 1 ELSE v_loops[i] END;
        END LOOP;
    END LOOP;
    FOR i IN REVERSE v_count .. 1 LOOP
        v_node := v_nodes[i];
        v_type := v_node->>'type';
        v_left := v_node->'left';
        v_right := v_node->'right';
        v_condition := v_node->'condition';
        v_box := 'n' || i - 1;
        v_end := 'm' || i - 1;
        v_label := duroxide.mermaid(duroxide.explain_node(v_node));
        CASE v_type
        WHEN 'THEN' THEN
            v_entries[i] := v_entries[v_left + 1];
            v_exits[i] := v_exits[v_right + 1];
            v_edges := v_edges || (v_exits[v_left + 1] || ' --> ' || v_entries[v_right + 1]);
        WHEN 'IF' THEN
            v_boxes[2 * i - 1] := v_box || '{' || v_label || '}';
            v_boxes[2 * i] := v_end || '(( ))';
            v_edges := v_edges || (v_box || ' -->|then| ' || v_entries[v_left + 1]);
            v_edges := v_edges || (v_box || ' -->|else| ' || v_entries[v_right + 1]);
            v_edges := v_edges || (v_exits[v_left + 1] || ' --> ' || v_end);
            v_edges := v_edges || (v_exits[v_right + 1] || ' --> ' || v_end);
            v_entries[i] := v_box;
            v_exits[i] := v_end;
            IF v_condition IS NOT NULL THEN
                v_edges := v_edges || (v_exits[v_condition + 1] || ' --> ' || v_box);
                v_entries[i] := v_entries[v_condition + 1];
            END IF;
        WHEN 'LOOP' THEN
            v_boxes[2 * i - 1] := v_box || '{{' || v_label || '}}';
            v_boxes[2 * i] := v_end || '(( ))';
            v_edges := v_edges || (v_box || ' --> ' || v_entries[v_left + 1]);
            IF v_condition IS NULL THEN
                v_edges := v_edges || (v_exits[v_left + 1] || ' -->|again| ' || v_box);
            ELSE
                v_edges := v_edges || (v_exits[v_left + 1] || ' --> ' || v_entries[v_condition + 1]);
                v_edges := v_edges || (v_exits[v_condition + 1] || ' -->|again| ' || v_box);
                v_edges := v_edges || (v_exits[v_condition + 1] || ' -->|done| ' || v_end);
            END IF;
            v_entries[i] := v_box;
            v_exits[i] := v_end;
        WHEN 'JOIN', 'RACE' THEN
            v_children := ARRAY[v_left, v_right] || ARRAY(SELECT e.value::integer FROM jsonb_array_elements_text(v_node->'extras') WITH ORDINALITY e(value, n) ORDER BY e.n);
            v_boxes[2 * i - 1] := v_box || '[/' || v_label || '\]';
            v_boxes[2 * i] := v_end || CASE v_type WHEN 'JOIN' THEN '[\"all"/]' ELSE '[\"first"/]' END;
            FOREACH v_child IN ARRAY v_children LOOP
                v_edges := v_edges || (v_box || ' --> ' || v_entries[v_child + 1]);
                v_edges := v_edges || (v_exits[v_child + 1] || ' --> ' || v_end);
            END LOOP;
            v_entries[i] := v_box;
            v_exits[i] := v_end;
        ELSE
            v_boxes[2 * i - 1] := v_box || CASE v_type WHEN 'SQL' THEN '[' || v_label || ']' WHEN 'BREAK' THEN '([' || v_label || '])'
                                   WHEN 'HTTP' THEN '[[' || v_label || ']]' WHEN 'HTTP_MULTIPART' THEN '[[' || v_label || ']]'
                                   ELSE '(' || v_label || ')' END;
            v_entries[i] := v_box;
            v_exits[i] := v_box;
            IF v_type = 'BREAK' AND v_loops[i] IS NOT NULL THEN
                v_edges := v_edges || (v_box || ' -.->|break| m' || v_loops[i]);
            END IF;
        END CASE;
    END LOOP;
    -- Nothing follows a break.
    v_edges := ARRAY(SELECT e.edge FROM unnest(v_edges) WITH ORDINALITY e(edge, i)
                      WHERE e.edge ~ '^\S+ -\.->'
                         OR v_nodes[substring(e.edge FROM '^n(\d+) -->')::integer + 1]->>'type' IS DISTINCT FROM 'BREAK'
                      ORDER BY e.i DESC);
    RETURN concat_ws(E'\n', 'flowchart TD', (SELECT string_agg('    ' || b.box, E'\n' ORDER BY b.i) FROM unnest(v_boxes) WITH ORDINALITY b(box, i) WHERE b.box IS NOT NULL),
        (SELECT string_agg('    ' || e.edge, E'\n' ORDER BY e.i) FROM unnest(v_edges) WITH ORDINALITY e(edge, i)),
        (SELECT string_agg(format('    class %s %s', c.boxes, c.class), E'\n' ORDER BY c.class)
           FROM (SELECT u.class, string_agg('n' || u.i - 1, ',' ORDER BY u.i) AS boxes FROM unnest(classes) WITH ORDINALITY u(class, i)
                  WHERE v_boxes[2 * u.i - 1] IS NOT NULL GROUP BY u.class) c),
        CASE WHEN classes IS NOT NULL THEN
            E'    classDef completed fill:#c8e6c9,stroke:#2e7d32,color:#000\n    classDef failed fill:#ffcdd2,stroke:#c62828,color:#000\n'
            '    classDef running fill:#bbdefb,stroke:#1565c0,color:#000\n    classDef pending fill:#fff,stroke:#9e9e9e,color:#000\n'
            '    classDef skipped fill:#eee,stroke:#bdbdbd,color:#757575,stroke-dasharray:4' END);
END $$;

-- The live view; the texts for what can't be drawn are those of df.explain.
CREATE FUNCTION duroxide.diagram_instance(p_instance text) RETURNS text
LANGUAGE plpgsql STABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_instance record;
    v_classes text[];
BEGIN
    SELECT i.label, i.graph, duroxide.shown_status(i.status, q.started_at) AS status INTO v_instance
      FROM duroxide.instances i LEFT JOIN duroxide.queue q ON q.instance_id = i.id WHERE i.id = p_instance;
    IF NOT FOUND THEN
        RETURN format('Instance ''%s'' not found', p_instance);
    END IF;
    SELECT array_agg(n.inferred_status ORDER BY n.place) INTO v_classes FROM duroxide.node_rows(p_instance) n;
    IF v_classes IS NULL THEN
        RETURN format('No nodes found for instance ''%s''', p_instance);
    END IF;
    RETURN concat(E'---\ntitle: ', to_json(concat('Instance ', p_instance, ' (' || v_instance.label || ')', ': ', v_instance.status)),
                  E'\n---\n', duroxide.diagram_graph(v_instance.graph, v_classes));
END $$;

-- What df.explain takes, df.diagram takes.
CREATE FUNCTION df.diagram(input text) RETURNS text
LANGUAGE sql STRICT
RETURN duroxide.explain(input, current_setting('search_path'), true);

-- Removing ---------------------------------------------------------------------------------------------------------

-- Deleting the row of an instance, which row security allows for one's own, removes all that belongs to it.
-- SECURITY DEFINER: nobody but the owner may write those tables. A worker that still runs the instance finds its lease gone.
CREATE FUNCTION duroxide.on_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM duroxide.queue q USING gone g WHERE q.instance_id = g.id;
    DELETE FROM duroxide.signals s USING gone g WHERE s.instance_id = g.id;
    DELETE FROM duroxide.history h USING gone g WHERE h.instance_id = g.id;
    RETURN NULL;
END $$;
CREATE TRIGGER on_delete AFTER DELETE ON duroxide.instances
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION duroxide.on_delete();

-- What row security lets a role see, newest first: a role with few workflows must not pay for those of others.
CREATE INDEX idx_instances_submitted_by ON duroxide.instances (submitted_by, created_at DESC, id);
-- The same for those of one status; what is completed is most of it all, and found well enough by the index above.
CREATE INDEX idx_instances_incomplete ON duroxide.instances (submitted_by, status, created_at DESC, id) WHERE status <> 'completed';
-- For df.prune and for retention.
CREATE INDEX idx_instances_ended_at ON duroxide.instances (ended_at) WHERE ended_at IS NOT NULL;

-- Removes an instance with all that is known of it, as part of the caller's transaction; one that has not ended only by
-- force: what it runs at that moment is rolled back.
CREATE FUNCTION df.delete_instance(instance_id text, force boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF NOT duroxide.is_finished(delete_instance.instance_id) AND NOT force THEN
        RAISE EXCEPTION 'instance % has not ended', delete_instance.instance_id
            USING ERRCODE = '55000',
                  HINT = 'Cancel it first with df.cancel(), or delete it all the same: df.delete_instance(id, force => true).';
    END IF;
    DELETE FROM duroxide.instances i WHERE i.id = delete_instance.instance_id;
    RETURN format('Instance %s deleted', delete_instance.instance_id);
END $$;

-- Removes the instances that ended before a time, as far as the caller can see them; returns how many.
CREATE FUNCTION df.prune(completed_before timestamptz) RETURNS bigint
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_count bigint;
BEGIN
    DELETE FROM duroxide.instances i WHERE i.ended_at < completed_before;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;

-- One batch of retention: removes up to p_limit of the instances that ended before p_before, or are not among the p_keep
-- (null: any number) that ended last, the oldest first, from p_after on; returns how many, and where the next batch has to
-- begin: what was removed before it need not be passed by again, however long its remains stay in the index. Null for both where
-- another worker is at it. An instance that a worker still has to let go of (it was cancelled a moment ago) stays.
CREATE FUNCTION duroxide.retain(p_before timestamptz, p_keep integer, p_after timestamptz, p_limit integer,
                                OUT removed integer, OUT reached timestamptz)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_before timestamptz := p_before;
BEGIN
    IF NOT pg_try_advisory_xact_lock('duroxide.instances'::regclass::oid::integer, 1) THEN
        RETURN;
    END IF;
    IF p_keep IS NOT NULL THEN
        v_before := greatest(v_before, (SELECT i.ended_at FROM duroxide.instances i WHERE i.ended_at IS NOT NULL
                                         ORDER BY i.ended_at DESC OFFSET p_keep - 1 LIMIT 1));
    END IF;
    WITH old AS (
        SELECT i.id, i.ended_at FROM duroxide.instances i
         WHERE i.ended_at < v_before AND i.ended_at >= p_after
           AND NOT EXISTS (SELECT FROM duroxide.queue q WHERE q.instance_id = i.id)
         ORDER BY i.ended_at LIMIT p_limit FOR UPDATE OF i SKIP LOCKED
    ), gone AS (
        DELETE FROM duroxide.instances i USING old o WHERE i.id = o.id RETURNING i.ended_at
    )
    SELECT count(*), max(g.ended_at) INTO removed, reached FROM gone g;
    -- A signal that was on its way when its instance ended: nobody will ever take it.
    DELETE FROM duroxide.signals s
     WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n
                      WHERE NOT n.seen AND NOT EXISTS (SELECT FROM duroxide.queue q WHERE q.instance_id = n.instance_id)
                      LIMIT p_limit FOR UPDATE SKIP LOCKED);
END $$;
REVOKE ALL ON FUNCTION duroxide.retain(timestamptz, integer, timestamptz, integer) FROM PUBLIC;
